"""Deltas made here give the same logits in peft, and what peft makes gives the same logits here.

The task models are HuggingFace's, loaded from the same small checkpoint with heads of their own, random ones: what a
delta does not bring differs.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from bertology_serve.deltas import store
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Job, Pipeline, Request
from bertology_serve.errors import Unsupported
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.vera import Vera
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.training.convert import ConvertOptions, convert
from tests import tiny
from tests.deltas import samples

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*", "ignore:.*no bias term.*")

AUTO: dict[str, Any] = {
    "classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "multi-label": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "multiple-choice": transformers.AutoModelForMultipleChoice,
    "embedding": transformers.AutoModel,
}
RECORDS: dict[str, dict[str, Any]] = {
    "classification": {"text": "the cat was very good", "text_pair": "a dog , not"},
    "regression": {"text": "the cat was very good", "text_pair": "a dog , not"},
    "multi-label": {"text": "the cat was very good"},
    "token-classification": {"tokens": "Ada met the cat in Paris".split()},
    "question-answering": {"question": "where was the dog ?", "context": "the dog was in Paris , very late"},
    "multiple-choice": {"question": "the cat", "choices": ["the house", "a very cold river bank"]},
    "embedding": {"text": "the cat was very good"},
}
ROUNDING, MATTERS = 1e-4, 1e-3  # what float32 does on any processor; what a forgotten part would do
LORA = Lora(("query", "key", "value", "output", "up", "down"), rank=3)


@dataclass(frozen=True)
class Lab:
    """A small checkpoint, and the encoder loaded from it."""

    path: Path
    encoder: Encoder

    def task_model(self, task: TaskSpec) -> Any:
        """HuggingFace's model for a task; what the checkpoint lacks is random."""
        return copy.deepcopy(_task_model(self.path, task))

    def ours(self, delta: Delta) -> tuple[Tensor, Job]:
        """The logits that the engine gives, and what it was asked."""
        pipeline = Pipeline(self.encoder)
        pipeline.add(delta)
        job = pipeline.prepare(Request(delta.name, RECORDS[delta.task.kind], logits=True))
        answer = pipeline.run([job])[0].answer
        return torch.tensor(answer["embedding" if delta.task.kind == "embedding" else "logits"]), job


@functools.cache
def _task_model(path: Path, task: TaskSpec) -> Any:
    torch.manual_seed(7)
    labelled = task.kind in ("classification", "multi-label", "regression", "token-classification")
    return AUTO[task.kind].from_pretrained(path, **({"num_labels": task.outputs} if labelled else {})).eval()


@pytest.fixture(scope="module", params=samples.FAMILIES)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    path = tmp_path_factory.mktemp(request.param)
    return Lab(path, tiny.encoder(request.param, path))


@torch.no_grad()
def theirs(model: Any, job: Job, kind: str) -> Tensor:
    """What a HuggingFace or peft model answers to the same token ids, shaped as ours."""
    longest = max(len(encoding) for encoding in job.encodings)

    def padded(rows: list[tuple[int, ...]]) -> Tensor:
        table = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        return table[None] if kind == "multiple-choice" else table

    inputs = {
        "input_ids": padded([encoding.ids for encoding in job.encodings]),
        "attention_mask": padded([(1,) * len(encoding) for encoding in job.encodings]),
    }
    if model.config.model_type in ("bert", "electra", *tiny.OTHERS) and kind != "embedding":
        inputs["token_type_ids"] = padded([encoding.types for encoding in job.encodings])
    out = model(**inputs)
    if kind == "question-answering":
        return torch.stack([out.start_logits[0], out.end_logits[0]], -1)
    return out.last_hidden_state[0].mean(0) if kind == "embedding" else out.logits[0]


def difference(one: Tensor, other: Tensor) -> float:
    assert one.numel() == other.numel()
    return float((one.flatten() - other.flatten()).abs().max())


def check_that_it_matters(lab: Lab, delta: Delta, logits: Tensor) -> None:
    """Without its components the same head answers otherwise, by more than the tolerance."""
    silent = replace(delta, tensors={name: torch.zeros_like(tensor) for name, tensor in delta.tensors.items()})
    assert difference(lab.ours(silent)[0], logits) > MATTERS


def check_in_peft(lab: Lab, delta: Delta, directory: Path) -> None:
    """Saved, loaded by peft into a fresh task model: the same logits, and the delta matters."""
    store.save(delta, directory, lab.encoder.anatomy, lab.encoder.config.to_dict())
    model = peft.PeftModel.from_pretrained(lab.task_model(delta.task), str(directory)).eval()
    ours, job = lab.ours(store.load(directory, lab.encoder.anatomy))
    found = theirs(model, job, delta.task.kind)
    assert difference(ours, found) <= ROUNDING
    check_that_it_matters(lab, delta, found)


@pytest.mark.parametrize("kind", samples.TASKS)
def test_lora_made_here_answers_alike_in_peft(lab: Lab, tmp_path: Path, kind: str) -> None:
    check_in_peft(lab, tiny.delta(lab.encoder, "x", [LORA], samples.TASKS[kind]), tmp_path / "x")


def test_slices_and_rslora_and_chosen_layers_answer_alike_in_peft(lab: Lab, tmp_path: Path) -> None:
    for i, spec in enumerate((Lora(rank=2, rslora=True), Lora(("value",), rank=3, alpha=5.5, layers=(0, 2)))):
        check_in_peft(lab, tiny.delta(lab.encoder, "x", [spec], samples.CLASSES, size=0.2), tmp_path / f"x{i}")


def test_attention_biases_made_here_answer_alike_in_peft(lab: Lab, tmp_path: Path) -> None:
    for i, spec in enumerate((Bitfit("attention"), Bitfit("attention", layers=(1,)))):
        delta = tiny.delta(lab.encoder, "x", [spec], samples.CLASSES, size=0.3)
        check_in_peft(lab, delta, tmp_path / f"x{i}")


def test_prompts_and_prefixes_in_pefts_way_answer_alike_in_peft(lab: Lab, tmp_path: Path) -> None:
    check_in_peft(lab, tiny.delta(lab.encoder, "x", [samples.PEFT_PROMPT], samples.CLASSES, size=0.3), tmp_path / "x")
    if lab.encoder.anatomy.family in ("bert", "roberta", "electra"):
        for kind in ("classification", "token-classification", "embedding"):
            delta = tiny.delta(lab.encoder, "x", [samples.PEFT_PREFIX], samples.TASKS[kind], size=0.3)
            check_in_peft(lab, delta, tmp_path / kind)


def vera_targets(lab: Lab) -> tuple[str, ...]:
    """Whole modules: peft has one pair of vectors for each."""
    return ("qkv", "down") if "qkv" in lab.encoder.anatomy.slots else ("query", "value", "down")


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A")
def test_vera_made_here_answers_alike_in_peft(lab: Lab, tmp_path: Path, saved: bool) -> None:
    spec = Vera(vera_targets(lab), rank=6, key=7, save_projection=saved, layers=(0, 2))
    check_in_peft(lab, tiny.delta(lab.encoder, "x", [spec], samples.CLASSES, size=0.5), tmp_path / "x")


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A")
def test_vera_made_by_peft_answers_alike_here(lab: Lab, tmp_path: Path, saved: bool) -> None:
    anatomy, root = lab.encoder.anatomy, f"{lab.encoder.anatomy.prefix}."
    config = peft.VeraConfig(
        task_type="SEQ_CLS",
        r=5,
        target_modules=[f"{root}{path}" for name in vera_targets(lab) for path in anatomy.slot(name).paths],
        projection_prng_key=11,
        save_projection=saved,
        vera_dropout=0.1,
        modules_to_save=own_head(lab, samples.CLASSES) or None,
    )
    check_here(lab, samples.CLASSES, config, tmp_path)


def ia3_targets(lab: Lab) -> tuple[str, ...]:
    """DeBERTa projects positions with its keys, which is refused here."""
    return ("value", "output") if lab.encoder.anatomy.family == "deberta-v2" else ("key", "value")


def test_ia3_made_here_answers_alike_in_peft(lab: Lab, tmp_path: Path) -> None:
    for i, spec in enumerate((Ia3(ia3_targets(lab)), Ia3(("value", "down"), ("output",), layers=(0, 2)))):
        delta = tiny.delta(lab.encoder, "x", [spec], samples.CLASSES, size=0.3)
        check_in_peft(lab, delta, tmp_path / f"x{i}")


def test_ia3_made_by_peft_answers_alike_here(lab: Lab, tmp_path: Path) -> None:
    anatomy, root = lab.encoder.anatomy, f"{lab.encoder.anatomy.prefix}."
    outer, inner = ([root + str(path) for slot in slots for path in anatomy.slot(slot).paths]
                    for slots in (ia3_targets(lab), ("down",)))  # fmt: skip
    config = peft.IA3Config(
        task_type="SEQ_CLS",
        target_modules=sorted({*outer, *inner}),
        feedforward_modules=inner,
        modules_to_save=own_head(lab, samples.CLASSES) or None,
    )
    check_here(lab, samples.CLASSES, config, tmp_path)


def test_dora_made_by_peft_answers_alike_when_converted(lab: Lab, tmp_path: Path) -> None:
    slots = ("value", "output") if lab.encoder.anatomy.family == "deberta-v2" else ("query", "value")
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        target_modules=targets(lab, *slots),
        r=3,
        lora_alpha=5,
        use_dora=True,
        modules_to_save=own_head(lab, samples.CLASSES) or None,
    )
    model = trained(lab, samples.CLASSES, config, tmp_path)
    told = ConvertOptions(labels=samples.CLASSES.labels, max_length=32)
    delta = convert(tmp_path, lab.encoder, "x", told)
    ours, job = lab.ours(delta)
    found = theirs(model, job, "classification")
    assert difference(ours, found) <= ROUNDING
    gains = torch.cat([t.flatten() for name, t in delta.tensors.items() if name.startswith("ia3.")])
    assert (gains - 1).abs().max() > 0.05
    unscaled = {name: torch.ones_like(t) if name.startswith("ia3.") else t for name, t in delta.tensors.items()}
    assert difference(lab.ours(replace(delta, tensors=unscaled))[0], found) > MATTERS


@pytest.mark.parametrize(
    "reached",
    [r".*(layer\.0\.attention\.self\.query|layer\.1\.attention\.self\.value)", ["query", "dense"]],
    ids=["other-layers", "pooler"],
)
def test_dora_of_other_layers_and_of_the_pooler(tmp_path: Path, reached: Any) -> None:
    """Slots may be reached in layers of their own, and the head's magnitudes go into its weight."""
    lab = Lab(tmp_path / "base", tiny.encoder("bert", tmp_path / "base"))
    for kind, task_type in (("classification", "SEQ_CLS"), ("embedding", "FEATURE_EXTRACTION")):
        task = samples.TASKS[kind]
        config = peft.LoraConfig(task_type=task_type, target_modules=reached, r=3, use_dora=True)
        model = trained(lab, task, config, tmp_path / kind)
        delta = convert(tmp_path / kind, lab.encoder, "x", ConvertOptions(max_length=32))
        ours, job = lab.ours(replace(delta, task=task))
        assert difference(ours, theirs(model, job, kind)) <= ROUNDING
        assert delta.provenance["verified"].startswith(f"against peft {peft.__version__}")


def test_prefixes_of_embeddings_are_compared_as_peft_runs_them(tmp_path: Path) -> None:
    """peft's model of features drops token types beside a prefix; no text of an embedding has any."""
    lab = Lab(tmp_path / "base", tiny.encoder("bert", tmp_path / "base"))
    config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    model = trained(lab, samples.VECTORS, config, tmp_path / "x")
    delta = convert(tmp_path / "x", lab.encoder, "x", ConvertOptions())
    ours, job = lab.ours(replace(delta, task=samples.VECTORS))
    assert difference(ours, theirs(model, job, "embedding")) <= ROUNDING


def test_minilm_answers_alike_in_peft(tmp_path: Path, minilm_path: Path) -> None:
    """The real one, with a rank and targets as people use them, and its 24 target modules."""
    minilm = Lab(minilm_path, Encoder.load("minilm"))
    spec = Lora(("query", "value", "output"), rank=8)
    check_in_peft(minilm, tiny.delta(minilm.encoder, "x", [spec], samples.CLASSES, size=0.02), tmp_path / "x")


def trained(lab: Lab, task: TaskSpec, config: Any, directory: Path) -> Any:
    """A peft model whose every trainable tensor has moved, saved by peft; the same whatever ran before."""
    torch.manual_seed(5)
    model = peft.get_peft_model(lab.task_model(task), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(directory)
    return model


def targets(lab: Lab, *slots: str) -> list[str]:
    """The modules of slots, packed ones as a whole, by their last names."""
    anatomy = lab.encoder.anatomy
    return sorted({str(anatomy.slot(slot).paths[0]).rpartition(".")[2] for slot in slots})


def own_head(lab: Lab, task: TaskSpec) -> list[str]:
    """What peft must be told to save, for it knows no more than ``classifier`` and ``qa_outputs``."""
    lacking = {"deberta-v2": ["pooler"], "modernbert": ["head", "classifier"]}.get(lab.encoder.anatomy.family, [])
    return [] if task.kind == "embedding" or (task.per_token and lacking == ["pooler"]) else lacking


def check_here(lab: Lab, task: TaskSpec, config: Any, directory: Path) -> None:
    """Trained and saved by peft, loaded here: the same logits."""
    model = trained(lab, task, config, directory)
    encoder = lab.encoder
    delta = store.load(
        directory, encoder.anatomy, base=encoder.ref, task=task, name="x", options=encoder.config.to_dict(),
        base_head=encoder.base_head,
    )  # fmt: skip
    ours, job = lab.ours(delta)
    found = theirs(model, job, task.kind)
    assert difference(ours, found) <= ROUNDING
    check_that_it_matters(lab, delta, found)


@pytest.mark.parametrize("kind", [kind for kind in samples.TASKS if kind != "multiple-choice"])
def test_lora_made_by_peft_answers_alike_here(lab: Lab, tmp_path: Path, kind: str) -> None:
    task = samples.TASKS[kind]
    types = dict.fromkeys(("classification", "multi-label", "regression"), "SEQ_CLS")
    types["token-classification"] = "TOKEN_CLS"
    task_type = types.get(kind, "FEATURE_EXTRACTION" if kind == "embedding" else "QUESTION_ANS")
    config = peft.LoraConfig(
        task_type=task_type,
        target_modules=targets(lab, "query", "value"),
        r=4,
        lora_alpha=6,
        alpha_pattern={targets(lab, "value")[0]: 3},
        modules_to_save=own_head(lab, task) or None,
    )
    check_here(lab, task, config, tmp_path)


@pytest.mark.parametrize("kind", ["classification", "embedding"])
def test_all_linear_made_by_peft_answers_alike_here(lab: Lab, tmp_path: Path, kind: str) -> None:
    """The pooler too has LoRA then: the delta's head owns its merged weight; embeddings do not read it."""
    family = lab.encoder.anatomy.family
    if kind == "classification" and family in ("distilbert", "modernbert"):
        pytest.skip("peft saves neither head nor LoRA of these heads so that it could be loaded again")
    pooled = family == "deberta-v2" and kind == "classification"
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if kind == "classification" else "FEATURE_EXTRACTION",
        target_modules="all-linear",
        r=2,
        lora_alpha=3,
        exclude_modules=["embeddings_project"] if family == "electra" else ["pooler.dense"] if pooled else None,
        modules_to_save=["pooler"] if pooled else None,
    )
    check_here(lab, samples.TASKS[kind], config, tmp_path / "x")
    reached = {name.split(".lora_")[0] for name in load_file(tmp_path / "x" / "adapter_model.safetensors")}
    assert ("base_model.model.bert.pooler.dense" in reached) == (family == "bert" and kind == "classification")


def test_all_linear_on_a_head_of_the_base_answers_alike_here(tmp_path: Path) -> None:
    """ModernBERT's prediction head, as checkpoints of masked language models bring it."""
    torch.manual_seed(0)
    masked = transformers.AutoModelForMaskedLM.from_config(tiny.CONFIGS["modernbert"]())
    masked.save_pretrained(tmp_path / "base")
    tiny.tokenizer("modernbert").save_pretrained(tmp_path / "base")
    lab = Lab(tmp_path / "base", Encoder.load(str(tmp_path / "base")))
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2, lora_alpha=3)
    check_here(lab, samples.CLASSES, config, tmp_path / "x")


@pytest.mark.parametrize("kind", ["classification", "token-classification"])
@pytest.mark.parametrize("family", sorted(tiny.OTHERS))
def test_heads_of_other_families_answer_as_pefts_do(tmp_path: Path, family: str, kind: str) -> None:
    """Their task models have poolers, which an adapter does not bring, or more; the reference runs in float64."""
    other = Lab(tmp_path / "base", tiny.encoder(family, tmp_path / "base"))
    task = samples.TASKS[kind]
    task_type = "TOKEN_CLS" if task.per_token else "SEQ_CLS"
    lacking = ["pooler", "classifier"] if family in ("gte", "nomic_bert") and not task.per_token else None
    config = peft.LoraConfig(
        task_type=task_type, target_modules=targets(other, "query", "value"), r=4, modules_to_save=lacking
    )
    model = trained(other, task, config, tmp_path / "x")
    delta = other.encoder.read_delta(tmp_path / "x")
    assert delta.task.kind == kind
    ours, job = other.ours(delta)
    found = theirs(model.double(), job, kind)
    assert difference(ours, found) <= ROUNDING
    check_that_it_matters(other, delta, found)


@pytest.mark.parametrize("family", sorted(tiny.OTHERS))
def test_deltas_of_other_families_answer_alike_in_peft(tmp_path: Path, family: str) -> None:
    other = Lab(tmp_path / "base", tiny.encoder(family, tmp_path / "base"))
    for i, spec in enumerate((LORA, samples.PEFT_PROMPT)):
        delta = tiny.delta(other.encoder, "x", [spec], samples.CLASSES, size=0.3)
        check_in_peft(other, delta, tmp_path / f"x{i}")


def test_a_family_whose_head_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    """Longformer's [CLS] attends globally in its classifier, which packed rows do not."""
    lab = Lab(tmp_path / "base", tiny.encoder("roberta", tmp_path / "base"))
    trained(lab, samples.CLASSES, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]), tmp_path / "x")
    anatomy = replace(lab.encoder.anatomy, family="longformer")
    with pytest.raises(Unsupported, match="head of longformer for classification is not known here"):
        store.load(tmp_path / "x", anatomy, base=lab.encoder.ref, options=lab.encoder.config.to_dict())


def test_alphas_by_patterns_with_groups_answer_alike_here(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "base", tiny.encoder("bert", tmp_path / "base"))
    patterns = {r"layer\.(0|2)\..*(query|key)": 3, r"layer\.[01]\.attention\.self\.value": 11}
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "key", "value"], r=4, lora_alpha=6, alpha_pattern=patterns
    )
    check_here(lab, samples.CLASSES, config, tmp_path / "x")


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], bias="lora_only"),
        peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], bias="all"),
        peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["LayerNorm", "classifier"]),
        peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias="lora_only", use_dora=True),
        peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]),
    ],
    ids=["lora_only", "all", "norms", "dora", "ln-tuning"],
)
@pytest.mark.filterwarnings(
    "ignore:.*will also change.*", "ignore:.*will not produce the same output.*", "ignore:Unsupported layer type.*"
)
def test_what_peft_holds_whole_is_converted(tmp_path: Path, config: Any) -> None:
    """Biases and norms come as differences from the base, which only ``convert`` has at hand."""
    lab = Lab(tmp_path / "base", tiny.encoder("bert", tmp_path / "base"))
    model = trained(lab, samples.CLASSES, config, tmp_path / "x")
    with pytest.raises(Unsupported, match=r"x.* convert it with bertology-serve convert"):
        lab.encoder.read_delta(tmp_path / "x")
    delta = convert(tmp_path / "x", lab.encoder, "x", ConvertOptions(max_length=32))
    ours, job = lab.ours(delta)
    found = theirs(model.double(), job, "classification")
    assert difference(ours, found) <= ROUNDING
    check_that_it_matters(lab, delta, found)


def test_texts_are_no_longer_than_the_tokenizer_reads(tmp_path: Path) -> None:
    """A directory of peft's is served where it lies, though the positions are more."""
    lab = Lab(tmp_path / "base", tiny.encoder("bert", tmp_path / "base"))
    assert lab.encoder.max_tokens < lab.encoder.anatomy.max_tokens
    trained(lab, samples.CLASSES, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]), tmp_path / "x")
    delta = lab.encoder.read_delta(tmp_path / "x")
    assert delta.task.max_length == lab.encoder.max_tokens
    lab.ours(delta)


def test_biases_made_by_peft_answer_alike_here(lab: Lab, tmp_path: Path) -> None:
    modules = targets(lab, "query", "value")
    config = peft.BeftConfig(
        task_type="SEQ_CLS", target_modules=modules, modules_to_save=own_head(lab, samples.CLASSES) or None
    )
    check_here(lab, samples.CLASSES, config, tmp_path)


def test_prompts_and_prefixes_made_by_peft_answer_alike_here(lab: Lab, tmp_path: Path) -> None:
    anatomy, task = lab.encoder.anatomy, samples.CLASSES
    sizes = {"num_layers": anatomy.layers, "num_attention_heads": anatomy.heads, "num_virtual_tokens": 3}
    common = {"task_type": "SEQ_CLS", "modules_to_save": own_head(lab, task) or None, **sizes}
    check_here(lab, task, peft.PromptTuningConfig(token_dim=anatomy.embedding_width, **common), tmp_path / "prompt")
    if anatomy.family in ("bert", "roberta", "electra"):
        for name, more in {"prefix": {}, "projected": {"prefix_projection": True, "encoder_hidden_size": 20}}.items():
            check_here(lab, task, peft.PrefixTuningConfig(token_dim=anatomy.hidden, **common, **more), tmp_path / name)
