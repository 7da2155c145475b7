"""What peft saves is read: real checkpoints, written by peft itself."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bertology_serve.deltas import store
from bertology_serve.deltas.delta import Delta
from bertology_serve.errors import FormatError, Unsupported
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import TaskSpec
from tests.deltas import samples

AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
    None: transformers.AutoModelForSequenceClassification,
}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def saved(directory: Path, family: str, config: Any, labels: int = 3) -> Path:
    """A checkpoint of peft's for a task model whose every adapter tensor is random."""
    torch.manual_seed(0)
    base = samples.config(family)
    base.num_labels = 2 if config.task_type == "QUESTION_ANS" else labels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(AUTO[config.task_type].from_config(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        model.save_pretrained(directory)
    return directory


def load(directory: Path, family: str, **given: Any) -> Delta:
    return store.load(directory, samples.anatomy(family), base=samples.base(family), name="x", **given)


def lora(**given: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 4} | given)


def update(delta: Delta, family: str, slot: str, layer: int) -> torch.Tensor:
    """The change [N, K] of a slot's weight."""
    found = delta.effects(samples.anatomy(family)).low_rank[slot]
    return found.b[layer].T @ found.a[layer]


def expected(tensors: Mapping[str, torch.Tensor], module: str, scale: float) -> torch.Tensor:
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    return scale * b @ a


def test_lora(tmp_path: Path) -> None:
    path = saved(tmp_path, "bert", lora(lora_alpha=12, lora_dropout=0.1))
    delta, tensors = load(path, "bert"), load_file(path / WEIGHTS)
    assert delta.specs == (Lora(("query", "value"), rank=4, alpha=12.0, dropout=0.1),)
    assert delta.task == TaskSpec("classification", ("LABEL_0", "LABEL_1", "LABEL_2"), 66)
    module = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_"
    assert torch.equal(delta.tensors["lora.query.a"][1], tensors[f"{module}A.weight"])
    assert torch.equal(delta.tensors["lora.query.b"][1].T, tensors[f"{module}B.weight"])
    assert torch.equal(delta.head["classifier.weight"], tensors["base_model.model.classifier.weight"])
    assert delta.base == samples.base("bert")
    assert delta.provenance["peft_version"] == peft.__version__


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_that_differ(tmp_path: Path, rslora: bool) -> None:
    config = lora(
        lora_alpha=6, use_rslora=rslora, rank_pattern={"layer.1.attention.self.query": 7}, alpha_pattern={"^.*value": 5}
    )
    path = saved(tmp_path, "bert", config)
    delta, tensors = load(path, "bert"), load_file(path / WEIGHTS)
    assert delta.specs[0].rank == 7
    for slot, layer, rank, alpha in (("query", 0, 4, 6), ("query", 1, 7, 6), ("value", 1, 4, 5)):
        wanted = expected(
            tensors, f"bert.encoder.layer.{layer}.attention.self.{slot}", alpha / (rank**0.5 if rslora else rank)
        )
        torch.testing.assert_close(update(delta, "bert", slot, layer), wanted)


def test_chosen_layers(tmp_path: Path) -> None:
    path = saved(tmp_path, "roberta", lora(layers_to_transform=[0, 2], layers_pattern="layer"))
    delta = load(path, "roberta")
    assert delta.specs[0].layers == (0, 2)
    assert delta.tensors["lora.query.a"].shape == (2, 4, 32)
    assert not update(delta, "roberta", "query", 1).any()


def test_slots_in_different_layers(tmp_path: Path) -> None:
    path = saved(tmp_path, "bert", lora(target_modules=r".*layer\.0\..*query|.*layer\.2\..*value"))
    delta = load(path, "bert")
    assert delta.specs[0].layers == (0, 2)
    assert update(delta, "bert", "query", 0).any()
    assert not update(delta, "bert", "query", 2).any()
    assert update(delta, "bert", "value", 2).any()


def test_a_packed_projection_is_a_slot_of_its_own(tmp_path: Path) -> None:
    path = saved(tmp_path, "modernbert", lora(target_modules=["Wqkv", "Wo"], modules_to_save=["head"]))
    delta = load(path, "modernbert")
    assert delta.specs[0].targets == ("qkv", "output", "down")
    assert set(delta.head) == {"head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("task_type", "labels", "kind", "outputs"),
    [
        ("SEQ_CLS", 1, "regression", 1),
        ("TOKEN_CLS", 5, "token-classification", 5),
        ("QUESTION_ANS", 2, "question-answering", 2),
        ("FEATURE_EXTRACTION", 2, "embedding", 0),
    ],
)
def test_the_task_follows_from_the_task_type(
    tmp_path: Path, task_type: str, labels: int, kind: str, outputs: int
) -> None:
    task = load(saved(tmp_path, "roberta", lora(task_type=task_type), labels), "roberta").task
    assert (task.kind, task.outputs) == (kind, outputs)


def test_the_kind_of_the_task_may_be_given_where_peft_names_none(tmp_path: Path) -> None:
    """Multiple choice has no task type; questions, and adapters without a head, show in their tensors."""
    path = edited(saved(tmp_path / "a", "bert", lora(), labels=1), task_type=None)
    assert load(path, "bert", task="multiple-choice").task == TaskSpec("multiple-choice", max_length=66)
    path = edited(saved(tmp_path / "b", "bert", lora(task_type="QUESTION_ANS")), task_type=None)
    task = load(path, "bert", options=samples.options("bert")).task
    assert (task.kind, task.token_types) == ("question-answering", True)  # peft's plain model hands them on
    path = edited(saved(tmp_path / "c", "bert", lora(task_type="FEATURE_EXTRACTION")), task_type=None)
    assert load(path, "bert").task.kind == "embedding"


@pytest.mark.parametrize("targets", [["query"], "all-linear"])
def test_a_plain_adapter_of_a_task_model_is_no_embedding(tmp_path: Path, targets: Any) -> None:
    """peft answers with the head of the base, which neither the adapter nor the encoder has."""
    path = saved(tmp_path / "a", "bert", lora(task_type=None, target_modules=targets))
    with pytest.raises(FormatError, match=r"adapts a task model, whose head it does not hold; .*or merge it with peft"):
        load(path, "bert")
    with pytest.raises(FormatError, match=r"holds no classifier; .*or merge it with peft"):
        load(path, "bert", task="classification")
    path = saved(tmp_path / "b", "bert", lora(task_type="FEATURE_EXTRACTION", target_modules=targets))
    assert load(edited(path, task_type=None), "bert").task.kind == "embedding"  # of the bare encoder, pooler and all


def test_a_given_task_is_taken_and_must_fit(tmp_path: Path) -> None:
    path = saved(tmp_path, "bert", lora())
    task = TaskSpec("classification", ("a", "b", "c"), 20)
    assert load(path, "bert", task=task).task == task
    with pytest.raises(FormatError, match=r"shape \[3, 32\]; expected \[2, 32\]"):
        load(path, "bert", task=TaskSpec("classification", ("a", "b"), 20))


@pytest.mark.parametrize(("targets", "biases"), [(["value"], "attention"), (["query", "dense"], "all")])
def test_beft(tmp_path: Path, targets: list[str], biases: str) -> None:
    path = saved(tmp_path, "bert", peft.BeftConfig(task_type="SEQ_CLS", target_modules=targets))
    if "dense" in targets:  # peft's names reach the pooler as well
        with pytest.raises(Unsupported, match="pooler"):
            load(path, "bert")
        config = peft.BeftConfig(task_type="SEQ_CLS", target_modules=["query", "attention.output.dense"])
        path = saved(tmp_path, "bert", config)
    delta, tensors = load(path, "bert"), load_file(path / WEIGHTS)
    assert delta.specs == (Bitfit(biases),)
    found = delta.effects(samples.anatomy("bert")).bias
    module = "attention.self.value" if biases == "attention" else "attention.output.dense"
    slot = "value" if biases == "attention" else "output"
    bias = tensors[f"base_model.model.bert.encoder.layer.2.{module}.beft_bias"][0]
    assert torch.equal(found[slot][2], bias)
    assert not found["key"].any()


@pytest.mark.parametrize(
    "config",
    [
        lambda names: peft.BeftConfig(task_type="SEQ_CLS", target_modules=names),
        lambda names: peft.IA3Config(task_type="SEQ_CLS", target_modules=names, feedforward_modules=[]),
    ],
)
def test_biases_and_factors_of_some_layers(tmp_path: Path, config: Any) -> None:
    names = [f"bert.encoder.layer.{layer}.attention.self.value" for layer in (0, 2)]
    delta = load(saved(tmp_path, "bert", config(names)), "bert")
    (spec,) = delta.specs
    assert spec.layers == (0, 2)
    assert {len(tensor) for tensor in delta.tensors.values()} == {2}


def test_prompt_tuning_keeps_pefts_ways(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3, token_dim=24)
    path = saved(tmp_path, "electra", config)
    delta = load(path, "electra")
    assert delta.specs == (samples.PEFT_PROMPT,)
    assert torch.equal(delta.tensors["prompt.vectors"], load_file(path / WEIGHTS)["prompt_embeddings"])
    assert delta.task.max_length == 63


def test_a_prompt_whose_rows_peft_pools_is_refused(tmp_path: Path) -> None:
    """ModernBERT's head may read the mean of all rows, in peft the prompt's among them."""
    more = {"num_virtual_tokens": 3, "modules_to_save": ["head", "classifier"]}
    path = saved(tmp_path, "modernbert", peft.PromptTuningConfig(task_type="SEQ_CLS", **more))
    assert load(path, "modernbert", options=samples.options("modernbert")).specs == (samples.PEFT_PROMPT,)
    with pytest.raises(Unsupported, match="peft pools the prompt's rows with the text's for classification"):
        load(path, "modernbert", options=samples.options("modernbert") | {"classifier_pooling": "mean"})


def test_prefix_tuning(tmp_path: Path) -> None:
    path = saved(tmp_path, "roberta", peft.PrefixTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=2))
    delta = load(path, "roberta")
    assert delta.specs == (samples.PEFT_PREFIX,)
    embeddings = load_file(path / WEIGHTS)["prompt_embeddings"].view(2, 6, 32)
    assert torch.equal(delta.tensors["prefix.keys"][1], embeddings[:, 2])
    assert torch.equal(delta.tensors["prefix.values"][1], embeddings[:, 3])


def ia3(*targets: str) -> Any:
    return peft.IA3Config(task_type="SEQ_CLS", target_modules=list(targets), feedforward_modules=[])


BEFT = peft.BeftConfig(task_type="SEQ_CLS", target_modules=["value"])


@pytest.mark.parametrize(
    ("config", "leaf"),
    [
        (lora(), "encoder.layer.1.attention.self.value.lora_{}.weight"),
        (lora(target_modules=r".*\.(query|key)"), "encoder.layer.1.attention.self.key.lora_{}.weight"),
        (lora(layers_to_transform=[1, 2]), "encoder.layer.1.attention.self.query.lora_{}.weight"),
        (lora(target_modules="all-linear"), "encoder.layer.2.output.dense.lora_{}.weight"),
        (lora(target_modules="all-linear"), "pooler.dense.lora_{}.weight"),
        (BEFT, "encoder.layer.1.attention.self.value.beft_bias"),
        (ia3("value"), "encoder.layer.1.attention.self.value.ia3_l"),
    ],
)
def test_a_file_that_lacks_a_layer_is_refused_by_name(tmp_path: Path, config: Any, leaf: str) -> None:
    path = saved(tmp_path, "bert", config)
    tensors = load_file(path / WEIGHTS)
    for side in "AB":
        tensors.pop("base_model.model.bert." + leaf.format(side), None)
    save_file(tensors, path / WEIGHTS)
    module = re.escape("bert." + leaf.partition(".lora_")[0].removesuffix(".beft_bias").removesuffix(".ia3_l"))
    with pytest.raises(FormatError, match=rf"lacks the tensors of {module}, which target_modules name") as caught:
        load(path, "bert")
    assert str(tmp_path) in str(caught.value)


def test_what_a_pattern_leaves_out_is_not_missed(tmp_path: Path) -> None:
    """Patterns that could take exponential time are not read: nothing is missed then."""
    for i, given in enumerate((
        {"target_modules": r".*layer\.[02]\..*query"},
        {"target_modules": "all-linear", "exclude_modules": ["pooler.dense", "output.dense"]},
        {"target_modules": r"(.*\.)+query"},
    )):  # fmt: skip
        assert load(saved(tmp_path / str(i), "bert", lora(**given)), "bert").tensors


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("bert", lora(use_dora=True), "use_dora=True is not read"),
        ("bert", lora(bias="all"), "bias=all is not read"),
        ("bert", lora(bias="lora_only"), "bias=lora_only is not read"),
        ("bert", lora(lora_bias=True), "lora_bias=True is not read"),
        ("bert", lora(init_lora_weights="pissa"), "init_lora_weights=pissa is not read"),
        ("bert", lora(target_modules=["query", "word_embeddings"]), "lora_embedding_"),
        ("bert", lora(target_modules=["query", "pooler.dense"]), "bert.pooler.dense has LoRA, but neither"),
        ("bert", lora(modules_to_save=["embeddings"]), "embeddings.* of the encoder whole; merge it with peft"),
        ("bert", lora(modules_to_save=["intermediate.dense"]),
         r"layer.\d.intermediate.dense.weight' of the encoder whole; merge it with peft"),
        ("bert", lora(modules_to_save=["encoder.layer.2"]), r"'bert.encoder.layer.2.*' of the encoder whole; merge it"),
        ("bert", lora(modules_to_save=["LayerNorm"]), "of the encoder whole; convert it with"),
        ("bert", ia3("pooler.dense"), "is no IA3 on a linear"),
        ("bert", peft.LoHaConfig(task_type="SEQ_CLS", target_modules=["query"]),
         "holds peft's LOHA; peft's convert_to_lora makes a LoRA of it; did you mean"),
        ("bert", peft.OFTConfig(task_type="SEQ_CLS", target_modules=["query"], oft_block_size=8),
         "holds peft's OFT; merge it with peft .* convert that directory"),
        ("bert", peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]), "of the encoder whole"),
        ("bert", peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2, num_transformer_submodules=2),
         "num_transformer_submodules=2 is not read here; peft cannot merge it either: train it again without"),
        ("bert", peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2),
         "peft pools the prompt's rows with the text's for embedding, .*train it again with another method"),
        ("mpnet", peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2), "no prefixes on"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_by_name(tmp_path: Path, family: str, config: Any, message: str) -> None:
    with pytest.raises((Unsupported, FormatError), match=message) as caught:
        load(saved(tmp_path, family, config), family)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value), "which adapter it is"


def test_a_head_that_peft_lost_is_missed(tmp_path: Path) -> None:
    """peft issue 2171: DeBERTa's pooler stays random and unsaved; ModernBERT's classifier of questions too."""
    path = saved(tmp_path / "a", "deberta-v3", lora(target_modules=["query_proj"]))
    with pytest.raises(FormatError, match=r"the head lacks pooler\.dense\.weight"):
        load(path, "deberta-v3")
    path = saved(tmp_path / "b", "modernbert", lora(target_modules=["Wqkv"], task_type="QUESTION_ANS"))
    with pytest.raises(FormatError, match=r"the head lacks classifier\.weight"):
        load(path, "modernbert")


def test_token_types_that_peft_dropped_stay_dropped(tmp_path: Path) -> None:
    path = saved(tmp_path, "bert", lora(task_type="QUESTION_ANS"))
    assert not load(path, "bert", options=samples.options("bert")).task.token_types


def edited(path: Path, **values: Any) -> Path:
    table = json.loads((path / CONFIG).read_text()) | values
    (path / CONFIG).write_text(json.dumps(table))
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"new_setting": 3}, "new_setting=3 is not read"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'; expected a number"),
        ({"lora_dropout": 2.0}, "dropout is 2.0"),
        ({"alpha_pattern": {"(a+)+$": 3}}, r"alpha_pattern '\(a\+\)\+\$' is not read"),
        ({"alpha_pattern": {"a.*b.*c.*": 3}}, "is not read"),
        ({"alpha_pattern": {"(e|e)(n|n)(c|c)": 3}}, "is not read"),
        ({"alpha_pattern": {"(a|b)?": 3}}, "is not read"),
        ({"alpha_pattern": {"\\": 3}}, "is no pattern"),
        ({"peft_type": None}, "holds peft's None"),
        ({"task_type": None}, "convert it with --task"),
        ({"task_type": "CAUSAL_LM"}, "convert it with --task"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules=2 is not read"),
    ],
)
def test_malformed_configurations_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = edited(saved(tmp_path, "bert", lora()), **values)
    with pytest.raises((Unsupported, FormatError), match=message):
        load(path, "bert")


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{QUERY}B.weight": None}, "lora_A and lora_B are"),
        ({f"{QUERY}A.weight": torch.zeros(4, 31)}, r"expected \[r, 32\]"),
        ({f"{QUERY}A.weight": torch.zeros(0, 32), f"{QUERY}B.weight": torch.zeros(32, 0)}, r"expected \[r, 32\]"),
        ({f"{QUERY}A.weight": torch.zeros(4)}, r"expected \[r, 32\]"),
        ({f"{QUERY}magnitude_vector": torch.zeros(4)}, "magnitude_vector' is no plain LoRA"),
        ({"evil": torch.zeros(4)}, "belongs to no method"),
        ({"base_model.model.evil": torch.zeros(4)}, "unknown tensor 'evil'"),
        ({"base_model.model.classifier.weight": None, "base_model.model.classifier.bias": None}, "holds no classifier"),
        ({"base_model.model.classifier.bias": torch.zeros(9)}, r"shape \[9\]; expected \[3\]"),
        ({"base_model.model.classifier.bias": torch.full((3,), torch.nan)}, "NaN"),
    ],
)
def test_malformed_tensors_are_refused(tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    path = saved(tmp_path, "bert", lora())
    tensors = {name: tensor for name, tensor in (load_file(path / WEIGHTS) | changes).items() if tensor is not None}
    save_file(tensors, path / WEIGHTS)
    with pytest.raises((Unsupported, FormatError), match=message) as caught:
        load(path, "bert")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value), "which adapter it is"


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_virtual_tokens_of_another_width_are_refused(tmp_path: Path, method: str) -> None:
    kind = {"PROMPT_TUNING": peft.PromptTuningConfig, "PREFIX_TUNING": peft.PrefixTuningConfig}[method]
    path = saved(tmp_path, "bert", kind(task_type="SEQ_CLS", num_virtual_tokens=2))
    tensors = load_file(path / WEIGHTS)
    for shape in ((2, 31), (2,), (2, 2, 32)):
        save_file({**tensors, "prompt_embeddings": torch.zeros(shape)}, path / WEIGHTS)
        with pytest.raises(FormatError, match=r"expected \[V, "):
            load(path, "bert")


def test_heads_as_older_versions_wrapped_them(tmp_path: Path) -> None:
    path = saved(tmp_path, "bert", lora())
    tensors = load_file(path / WEIGHTS)
    weight = tensors.pop("base_model.model.classifier.weight")
    tensors["base_model.model.classifier.modules_to_save.weight"] = weight
    tensors["base_model.model.classifier.original_module.weight"] = weight + 1
    save_file(tensors, path / WEIGHTS)
    assert torch.equal(load(path, "bert").head["classifier.weight"], weight)


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    path = saved(tmp_path, "bert", lora())
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path / WEIGHTS).items()}, path / WEIGHTS)
    assert {tensor.dtype for tensor in load(path, "bert").tensors.values()} == {torch.float32}


def test_it_takes_the_encoder_to_load_it(tmp_path: Path) -> None:
    path = saved(tmp_path, "bert", lora())
    with pytest.raises(FormatError, match="names no weights; give its encoder"):
        store.load(path)


def test_an_imported_delta_is_saved_as_our_own(tmp_path: Path) -> None:
    delta = load(saved(tmp_path / "theirs", "bert", lora()), "bert")
    store.save(delta, tmp_path / "ours", samples.anatomy("bert"), samples.options("bert"))
    assert samples.same(store.load(tmp_path / "ours"), delta)
