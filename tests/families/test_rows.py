"""The families of docs/reference/families.md, each as a small random model: every kind, mixed, alone and exported."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    ModernBertConfig,
)

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import SpecError, Unsupported
from bertology_serve.export import exporting
from bertology_serve.export.emitter.emit import obstacle
from bertology_serve.export.export_inputs import ExportInputs, fold
from bertology_serve.families import FAMILIES
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.norms import Norms
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.kinds.vera import Vera
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.training.convert import ConvertOptions, convert
from tests import tiny
from tests.export.test_torch_exporter import difference

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "families.md"
TASK = TaskSpec("embedding", max_length=32, pooling="mean", head="none", normalize=False)
KINDS: dict[str, Any] = {
    "lora": Lora(rank=2),
    "bitfit": Bitfit(),
    "adapter": Adapter(width=3),
    "pfeiffer": Adapter("pfeiffer", width=3),
    "prompt": Prompt(2),
    "prefix": Prefix(2),
    "ia3": Ia3(),
    "norms": Norms(),
    "vera": Vera(rank=3),
}
TEXTS = ("the cat was good", "a very bad film . not great !", "dog", "Ada went to Paris in the red house , very late")


def of_type(name: str, **more: Any) -> Any:
    return functools.partial(AutoConfig.for_model, name, **tiny._SIZE, **tiny._OFFSET, pad_token_id=1, **more)


ROPE = {"rope_theta": 160000.0, "rope_type": "default"}
NAMED: dict[str, Any] = {
    "camembert": of_type("camembert"),
    "xlm-roberta": of_type("xlm-roberta"),
    # the switches of microsoft/deberta-base
    "deberta": of_type(
        "deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=-1,
        position_biased_input=False, type_vocab_size=0, pooler_hidden_act="gelu",
    ),
    "mmbert": lambda: ModernBertConfig(
        **tiny._SIZE, **tiny._FFN, local_attention=8, global_attn_every_n_layers=3, pad_token_id=0, cls_token_id=2,
        sep_token_id=3, rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE},
    ),
}  # fmt: skip
WANTED = (
    *NAMED, "modernbert", "albert", "eurobert", "eurobert-grouped", "gte", "jina_embeddings_v3", "nomic_bert",
)  # fmt: skip
LACKING = {"albert": {"prefix"}, "deberta": {"prefix", "norms"}, "eurobert": {"norms"}, "eurobert-grouped": {"norms"}}


@pytest.fixture(params=[name for name in WANTED if name in tiny.CONFIGS | tiny.OTHERS | tiny.HEADLESS | NAMED])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of them, where this transformers has it."""
    monkeypatch.setattr(tiny, "CONFIGS", tiny.CONFIGS | NAMED)
    name: str = request.param
    return name


def test_every_kind_answers_in_a_mixed_batch_as_alone(family: str, tmp_path: Path) -> None:
    encoder = tiny.encoder(family, tmp_path)
    assert encoder.packs == (family != "deberta"), encoder.packing
    made, lacking = Pipeline(encoder), set()
    for seed, (name, spec) in enumerate(KINDS.items()):
        try:
            made.add(tiny.delta(encoder, name, [spec], TASK, seed))
        except (Unsupported, SpecError):
            lacking.add(name)
    assert lacking == LACKING.get(family, set())
    made.add(tiny.delta(encoder, "bare", [], TASK))
    names = [name for name in (*KINDS, "bare") if name not in lacking]
    asked = [(name, text) for text in TEXTS for name in names]
    jobs = [made.prepare(Request(name, {"text": text})) for name, text in asked]
    rows = {key: torch.tensor(found.answer["embedding"]) for key, found in zip(asked, made.run(jobs), strict=True)}
    for (name, text), job in zip(asked, jobs, strict=True):
        (alone,) = made.run([job])
        assert (rows[name, text] - torch.tensor(alone.answer["embedding"])).abs().max() <= 1e-5
        if name != "bare":
            assert (rows[name, text] - rows["bare", text]).abs().max() > 1e-4, name


@torch.no_grad()
def test_transformers_gives_the_same_with_the_delta_folded_in(family: str, tmp_path: Path) -> None:
    path = tiny.save(family, tmp_path)
    encoder, theirs = Encoder.load(path), AutoModel.from_pretrained(path, dtype=torch.float32).double().eval()
    scaled = [Norms()] if "norms" not in LACKING.get(family, ()) else []
    delta = tiny.delta(encoder, "x", [Lora(("query", "output", "up", "down"), rank=2), Ia3(), *scaled], TASK)
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("pooler.")}
    theirs.load_state_dict(fold(state, delta.effects(encoder.anatomy), encoder.anatomy), strict=False)
    made = Pipeline(encoder)
    made.add(delta)
    for text in TEXTS:
        (found,) = made.answer([Request("x", {"text": text})])
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(0)
        assert (torch.tensor(found.answer["embedding"], dtype=torch.float64) - expected).abs().max() <= 1e-5


def test_a_delta_is_exported_and_verified(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny._SIZE, "num_hidden_layers", 1)
    encoder = tiny.encoder(family, tmp_path / "encoder")
    delta = tiny.delta(encoder, "x", [Lora(rank=2), Bitfit()], TASK)
    if obstacle(ExportInputs.of(encoder, delta, True)) is None:
        assert exporting.export(delta, tmp_path / "out", encoder, merge=True).report.passed
    else:  # torch's exporter, which takes ten seconds, writes what is compared here
        assert difference(encoder, delta, True) <= 1e-5
        assert difference(encoder, tiny.delta(encoder, "y", [Adapter(width=3), Prompt(2)], TASK), False) <= 1e-5


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*")
def test_adapters_of_peft_on_deberta_v1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converting compares with peft; what would change projections of positions is refused by name."""
    monkeypatch.setattr(tiny, "CONFIGS", tiny.CONFIGS | NAMED)
    encoder = tiny.encoder("deberta", tmp_path / "base")
    for name, targets in (("rows", ["in_proj", "output.dense"]), ("positions", ["in_proj", "pos_q_proj"])):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        more = {"init_lora_weights": False, "modules_to_save": ["pooler", "classifier"]}
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets, **more)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / name)
    found = convert(tmp_path / "rows", encoder, "x", ConvertOptions())
    assert found.provenance["verified"].startswith(f"against peft {peft.__version__}")
    with pytest.raises(Unsupported, match=r"self\.pos_q_proj' is no linear projection that deltas of deberta change"):
        convert(tmp_path / "positions", encoder, "x", ConvertOptions())


def facts(encoder: Encoder) -> list[str]:
    """What docs/reference/families.md says of a family: rows, kinds, ONNX of one delta and of many, heads."""
    lacking = []
    for name, spec in KINDS.items():
        try:
            TrainableDelta(encoder, [spec], TASK).effects()
        except (Unsupported, SpecError):
            lacking.append(name)
    bare = ExportInputs.of(encoder, tiny.delta(encoder, "x", [], TASK), True)
    return [
        "packed" if encoder.packs else "padded",
        f"all but {', '.join(lacking)}" if lacking else "all",
        "torch's exporter" if obstacle(bare) else "own",
        "no" if obstacle(bare, many=True) else "yes",
        "HuggingFace's" if encoder.family.sequence else "linear",
    ]


TABLE = {
    cells[0].strip("`"): cells[2:]
    for line in DOCS.read_text(encoding="utf-8").splitlines()
    if line.startswith("| `") and not line.startswith("| `model_type`")
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}
MODELS = {
    **tiny.CONFIGS, **tiny.OTHERS, **NAMED,
    "deberta-v2": tiny.CONFIGS["deberta-v3"],
    "roberta-prelayernorm": of_type("roberta-prelayernorm"), "xlm-roberta-xl": of_type("xlm-roberta-xl"),
    "data2vec-text": of_type("data2vec-text"), "longformer": of_type("longformer", attention_window=8),
    "splinter": of_type("splinter"),
}  # fmt: skip
if "eurobert" in CONFIG_MAPPING:  # what transformers 5.1 has no model of, or no fast tokenizer
    MODELS |= {"eurobert": tiny.HEADLESS["eurobert-grouped"], "bert-generation": of_type("bert-generation")}


def test_the_page_names_every_family_that_is_known() -> None:
    told = {*TABLE, "xmod"}  # its layers have a linear for each language: see the page
    assert set(FAMILIES) <= told


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_page_says_what_a_family_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in MODELS:
        pytest.skip("this transformers has no such family")
    monkeypatch.setattr(tiny, "CONFIGS", tiny.CONFIGS | MODELS)
    assert facts(tiny.encoder(name, tmp_path)) == TABLE[name]


REFUSED = {
    "qwen3": "in qwen3 the first token does not see the last, as in a decoder; the embeddings of its last token",
    "llama": "as in a decoder",
    "modernbert-decoder": "as in a decoder",
    "t5": "t5 decoder",
    "bart": "bart decoder",
    "mixtral": "mixtral: found no down, up projection",
    "xlnet": "xlnet: found no key, output, query, value projection",
    "gpt2": "gpt2: found no down",
    "convbert": "ConvBertLayer has two output projections",
    "mobilebert": "MobileBertLayer has two up projections",
    "layoutlm": r"\(layoutlm\) does not run on token ids alone",
    "bros": "does not run on token ids alone",
    "lxmert": "does not run on token ids alone",
    "dpr": "does not run on token ids alone",
    "fnet": "fnet: found no",
    "mamba": "MambaBlock has two up projections",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """Of those in transformers' list a few of each sort; none ends in an error of Python's."""
    small = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "d_model": 32,
             "n_layer": 2, "n_head": 4, "n_embd": 32, "d_ff": 48, "d_kv": 8, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4,
              "decoder_attention_heads": 4, "num_layers": 1, "num_heads": 4, "embedding_size": 32}  # fmt: skip
    known = CONFIG_MAPPING[name]
    fields = {*known().to_dict(), *known.attribute_map}
    values = {**tiny._SIZE, **tiny._FFN, **small, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    model = AutoModel.from_config(known(**{key: value for key, value in values.items() if key in fields}))
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=REFUSED[name]):
        Encoder.load(str(tmp_path))


def test_a_checkpoint_of_another_form_is_refused_and_not_filled_with_random_weights(tmp_path: Path) -> None:
    """As jina-embeddings-v3 has it: an xlm-roberta by name, whose weights only its own code knows."""
    tiny.save("roberta", tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {name.replace("encoder.layer", "encoder.layers"): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})
    with pytest.raises(Unsupported, match=r"lacks 48 weights of transformers' RobertaModel, encoder.layer.0.*first"):
        Encoder.load(str(tmp_path))


def test_code_that_a_checkpoint_brings_is_refused(tmp_path: Path) -> None:
    tiny.save("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"model_type": "new", "auto_map": {"AutoConfig": "configuration.NewConfig", "AutoModel": "modeling.NewModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(Unsupported, match="brings code of its own, which is never run here"):
        Encoder.load(str(tmp_path))
