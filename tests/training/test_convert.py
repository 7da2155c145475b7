"""Checkpoints of other libraries; ``adapters`` does not run beside this transformers, so its layout is written out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bertology_serve.cli.main import main
from bertology_serve.deltas import store
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.interop.adapterhub import _factor, read_adapterhub, write_adapterhub
from bertology_serve.deltas.interop.peft_import import spelt_out
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import FormatError, NotFound, SpecError, Unsupported
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.training.convert import ConvertOptions, convert
from tests import tiny

TASK = TaskSpec("classification", ("bad", "good", "none"), 32, head="linear")
SPECS = {
    "houlsby": Adapter(width=5),
    "attention": Adapter(width=4, after="attention", activation="gelu"),
    "pfeiffer": Adapter("pfeiffer", width=8, drop_lowest=1),
    "layers": Adapter("pfeiffer", width=8, layers=(0, 2)),
}


def logits(encoder: Encoder, delta: Delta) -> torch.Tensor:
    pipeline = Pipeline(encoder)
    pipeline.add(delta)
    (answer,) = pipeline.answer([Request(delta.name, {"text": "the cat was very good"}, logits=True)])
    return torch.tensor(answer.answer["logits"])


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("kind", SPECS)
def test_adapterhub_there_and_back_again(tmp_path: Path, family: str, kind: str) -> None:
    encoder = tiny.encoder(family, tmp_path / "encoder")
    task = replace(TASK, head="hf") if family == "roberta" else TASK
    delta = tiny.delta(encoder, "mood", [SPECS[kind]], task, size=0.3)
    write_adapterhub(delta, tmp_path / "hub", encoder.anatomy)
    back = convert(tmp_path / "hub", encoder, "again", ConvertOptions(max_length=32))
    assert (back.specs, back.task) == (delta.specs, delta.task)
    assert torch.equal(logits(encoder, back), logits(encoder, delta))


def test_names_and_shapes_are_those_of_adapters(bert: Encoder, tmp_path: Path) -> None:
    """As adapters 1.3.0 writes them for a BertAdapterModel; up is a linear's weight there."""
    delta = tiny.delta(bert, "mood", [SPECS["pfeiffer"]], TASK)
    write_adapterhub(delta, tmp_path / "hub", bert.anatomy)
    tensors = load_file(tmp_path / "hub" / "adapter.safetensors")
    start = "bert.encoder.layer.1.output.adapters.mood."
    assert {name: tuple(t.shape) for name, t in tensors.items() if name.startswith(start)} == {
        f"{start}adapter_down.0.weight": (8, 32), f"{start}adapter_down.0.bias": (8,),
        f"{start}adapter_up.weight": (32, 8), f"{start}adapter_up.bias": (32,),
    }  # fmt: skip
    assert len(tensors) == 8
    config = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    assert (config["name"], config["model_type"], config["hidden_size"]) == ("mood", "bert", 32)
    assert {key: config["config"][key] for key in ("original_ln_before", "leave_out", "reduction_factor")} == {
        "original_ln_before": True, "leave_out": [0], "reduction_factor": 4
    }  # fmt: skip
    assert set(load_file(tmp_path / "hub" / "model_head.safetensors")) == {"heads.mood.1.weight", "heads.mood.1.bias"}
    houlsby = replace(tiny.delta(bert, "mood", [SPECS["houlsby"]], TASK), name="two")
    write_adapterhub(houlsby, tmp_path / "two", bert.anatomy)
    assert "bert.encoder.layer.0.attention.output.adapters.two.adapter_up.bias" in load_file(
        tmp_path / "two" / "adapter.safetensors"
    )


def as_adapters(
    place: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], labels: tuple[str, ...] = ("a", "b", "c")
) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """Writes an adapter called ``m`` as adapters 1.3.0 does, with a head of one layer; returns its weight and bias."""
    place.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "adapter.safetensors")
    about = {"hidden_size": 32, "model_type": "bert", "name": "m", "version": "adapters.1.3.0"}
    (place / "adapter_config.json").write_text(json.dumps(about | {"config": config}))
    head = {"head_type": "classification", "num_labels": len(labels), "layers": 1, "activation_function": "tanh",
            "label2id": {label: i for i, label in enumerate(labels)}, "use_pooler": False}  # fmt: skip
    (place / "head_config.json").write_text(json.dumps(about | {"config": head}))
    weight, bias = torch.randn(len(labels), 32), torch.randn(len(labels))
    others = {"heads.m2.1.weight": weight + 1, "heads.m2.1.bias": bias + 1}
    save_file({"heads.m.1.weight": weight, "heads.m.1.bias": bias, **others}, place / "model_head.safetensors")
    return place, weight, bias


TEXT = "the cat was very good"
LORA_CONFIG = {"architecture": "lora", "r": 4, "alpha": 6, "composition_mode": "add", "attn_matrices": ["q", "v"],
               "selfattn_lora": True, "use_gating": False, "use_dora": False, "dropout": 0.0}  # fmt: skip
LAYER = "bert.encoder.layer.{}."


def hidden(base: Path, encoder: Encoder, change: Any = None, **more: Any) -> torch.Tensor:
    """[CLS] of HuggingFace's model in float64, its weights changed."""
    model = transformers.AutoModel.from_pretrained(base).double().eval()
    with torch.no_grad():
        if change is not None:
            change(model)
        return model(**encoder.tokenizer(TEXT, return_tensors="pt"), **more).last_hidden_state[0, 0]


def check_logits(base: Path, made: tuple[Path, torch.Tensor, torch.Tensor], change: Any = None, **more: Any) -> Delta:
    encoder = Encoder.load(str(base))
    place, weight, bias = made
    delta = convert(place, encoder, "x", ConvertOptions(max_length=32))
    expected = hidden(base, encoder, change, **more) @ weight.double().T + bias.double()
    plain = hidden(base, encoder) @ weight.double().T + bias.double()
    assert (logits(encoder, delta) - expected).abs().max() < 1e-5
    assert (plain - expected).abs().max() > 1e-3
    return delta


def test_lora_of_adapterhub(tmp_path: Path) -> None:
    tiny.save("bert", tmp_path / "base")
    torch.manual_seed(5)
    modules = [LAYER.format(i) + m for i in (0, 2) for m in ("attention.self.query", "output.dense")]
    pairs = {m: (torch.randn(4, 48 if "output" in m else 32) * 0.2, torch.randn(32, 4) * 0.2) for m in modules}
    tensors = {f"{m}.loras.m.lora_{side}": pair["AB".index(side)] for m, pair in pairs.items() for side in "AB"}

    def change(model: Any) -> None:
        for module, (a, b) in pairs.items():
            model.get_submodule(module.removeprefix("bert.")).weight += 1.5 * (b @ a).double()

    delta = check_logits(tmp_path / "base", as_adapters(tmp_path / "hub", LORA_CONFIG, tensors), change)
    assert delta.specs == (Lora(("query", "down"), rank=4, alpha=6.0, layers=(0, 2)),)


def test_ia3_of_adapterhub(tmp_path: Path) -> None:
    """It scales what leaves the FFN's first linear, where peft scales what enters the second."""
    tiny.save("bert", tmp_path / "base")
    torch.manual_seed(5)
    modules = [LAYER.format(i) + m for i in range(3) for m in ("attention.self.key", "intermediate.dense")]
    factors = {m: 1 + 0.3 * torch.randn(48 if "inter" in m else 32, 1) for m in modules}
    tensors = {f"{m}.loras.m.lora_B": factor for m, factor in factors.items()}
    config = LORA_CONFIG | {"composition_mode": "scale", "r": 1, "alpha": 2}

    def change(model: Any) -> None:
        for module, factor in factors.items():
            linear = model.get_submodule(module.removeprefix("bert."))
            linear.weight *= 2 * factor
            linear.bias *= 2 * factor[:, 0]

    delta = check_logits(tmp_path / "base", as_adapters(tmp_path / "hub", config, tensors), change)
    assert delta.specs == (Ia3(("key", "up"), ()),)


@pytest.mark.parametrize("flat", [True, False])
def test_prefixes_of_adapterhub(tmp_path: Path, flat: bool) -> None:
    """The text keeps its positions. A prefix that is not flat comes from a network, which runs once."""
    tiny.save("bert", tmp_path / "base")
    torch.manual_seed(5)
    first, second = torch.nn.Linear(32, 8), torch.nn.Linear(8, 2 * 3 * 32)
    wte = torch.randn(3, 32)
    rows = second(torch.tanh(first(wte))).detach()
    parts = {"wte.weight": wte, **{f"control_trans.{i}.{n}": t for i, part in ((0, first), (2, second))
             for n, t in part.state_dict().items()}} if not flat else {"control_trans": rows.flatten()}  # fmt: skip
    start = "prefix_tuning.{}prefix_tunings.m.self_prefix."
    tensors = {f"bert.{start.format('')}{n}": t for n, t in parts.items()}
    tensors |= {f"{LAYER.format(2)}attention.self.{start.format('pool.')}{n}": t.clone() for n, t in parts.items()}
    config = {"architecture": "prefix_tuning", "prefix_length": 3, "flat": flat, "non_linearity": "tanh",
              "use_gating": False, "leave_out": [], "bottleneck_size": 8}  # fmt: skip
    cache = transformers.DynamicCache()
    for layer, (key, value) in enumerate(rows.double().view(1, 3, 6, 4, 8).permute(2, 0, 3, 1, 4).split(2)):
        cache.update(key, value, layer)
    length = len(tiny.tokenizer()(TEXT).input_ids)
    encoder = Encoder.load(str(tmp_path / "base"))
    place, weight, bias = as_adapters(tmp_path / "hub", config, tensors)
    delta = convert(place, encoder, "x", ConvertOptions(max_length=32))
    model = transformers.AutoModel.from_pretrained(tmp_path / "base").double().eval()
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([encoder.tokenizer(TEXT).input_ids]),
            attention_mask=torch.ones(1, 3 + length),
            position_ids=torch.arange(length)[None],
            past_key_values=cache,
        )
    expected = out.last_hidden_state[0, 0] @ weight.double().T + bias.double()
    assert (logits(encoder, delta) - expected).abs().max() < 1e-5
    assert delta.specs == (Prefix(3),)


def test_one_reduction_factor_a_layer(bert: Encoder, tmp_path: Path) -> None:
    """Narrower layers get rows of zeros, which change nothing."""
    delta = tiny.delta(bert, "mood", [SPECS["pfeiffer"]], TASK, size=0.3)
    place = write_adapterhub(delta, tmp_path / "hub", bert.anatomy)
    expected = logits(bert, convert(place, bert, "x", ConvertOptions(max_length=32)))
    tensors = load_file(place / "adapter.safetensors")
    cut = {"down.0.weight": 0, "down.0.bias": 0, "up.weight": 1}
    for name in [name for name in tensors if "layer.2" in name]:
        side = next((axis for end, axis in cut.items() if name.endswith(end)), None)
        if side is not None:
            tensors[name] = tensors[name].narrow(side, 0, 4).contiguous()
    save_file(tensors, place / "adapter.safetensors")
    edited(place, "adapter_config.json", reduction_factor={"2": 8, "default": 4}, leave_out=[0])
    narrower = convert(place, bert, "x", ConvertOptions(max_length=32))
    zeroed = {name: tensor.clone() for name, tensor in delta.tensors.items()}
    for name in zeroed:
        if name.endswith((".down", ".down_bias", ".up")):
            zeroed[name][1, 4:] = 0
    assert torch.equal(logits(bert, narrower), logits(bert, replace(delta, tensors=zeroed)))
    assert (logits(bert, narrower) - expected).abs().max() > 1e-3


def test_a_head_with_one_label_is_a_regression(bert: Encoder, tmp_path: Path) -> None:
    """The library trains it by the squared error; as a class it would always be certain."""
    delta = tiny.delta(bert, "mood", [SPECS["houlsby"]], TASK)
    hub = write_adapterhub(delta, tmp_path / "hub", bert.anatomy)
    tensors = load_file(hub / "adapter.safetensors")
    tensors = {name.replace("adapters.mood", "adapters.m"): tensor for name, tensor in tensors.items()}
    config = json.loads((hub / "adapter_config.json").read_text())["config"]
    place, _, _ = as_adapters(tmp_path / "one", config, tensors, ("LABEL_0",))
    found = convert(place, bert, "x", ConvertOptions(max_length=32))
    assert (found.task.kind, found.task.labels) == ("regression", ())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "prompt_tuning"}, "soft prompts enter after the embeddings' LayerNorm"),
        ({"architecture": "union"}, "architecture=union of AdapterHub is not read here; .*known: lora, prefix_tuning"),
        ({"use_gating": True}, "use_gating=True"),
        ({"use_dora": True}, "use_dora=True"),
        ({"composition_mode": "max"}, "composition_mode=max"),
        ({"alpha": "6"}, "alpha is '6'"),
        ({"architecture": "prefix_tuning", "leave_out": [0]}, "leave_out="),
        ({"architecture": "prefix_tuning", "prefix_length": 3, "non_linearity": "x"}, "non_linearity=x"),
        ({"architecture": "prefix_tuning", "prefix_length": 3, "flat": True}, "'control_trans' is missing"),
    ],
)
def test_other_methods_of_adapterhub_are_refused_by_name(
    bert: Encoder, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    path = LAYER.format(0) + "attention.self.query.loras.m.lora_"
    tensors = {f"{path}A": torch.zeros(4, 32), f"{path}B": torch.zeros(32, 4)}
    place, _, _ = as_adapters(tmp_path / "hub", LORA_CONFIG | values, tensors)
    with pytest.raises((Unsupported, FormatError), match=message) as caught:
        convert(place, bert, "x", ConvertOptions())
    assert str(place) in str(caught.value)


def test_every_width_has_its_reduction_factor() -> None:
    for hidden in (32, 384, 768, 1024):
        assert [hidden // _factor(hidden, width) for width in range(1, 300)] == list(range(1, 300))


def test_pickles_are_opened_when_converting(bert: Encoder, tmp_path: Path) -> None:
    delta = tiny.delta(bert, "mood", [SPECS["houlsby"]], TASK)
    place = write_adapterhub(delta, tmp_path / "hub", bert.anatomy)
    for safe, pickled in (("adapter", "pytorch_adapter"), ("model_head", "pytorch_model_head")):
        torch.save(load_file(place / f"{safe}.safetensors"), place / f"{pickled}.bin")
        (place / f"{safe}.safetensors").unlink()
    back = convert(place, bert, "again", ConvertOptions(max_length=32, labels=("x", "y", "z")))
    assert back.task.labels == ("x", "y", "z")
    assert torch.equal(logits(bert, back), logits(bert, delta))
    torch.save({"x": print}, place / "pytorch_adapter.bin")
    with pytest.raises(FormatError, match="holds more than tensors"):
        convert(place, bert, "again", ConvertOptions())


def edited(place: Path, file: str, **values: Any) -> None:
    table = json.loads((place / file).read_text())
    table["config"] |= values
    (place / file).write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("adapter_config.json", {"scaling": 2.0}, "scaling=2.0 of an AdapterHub adapter is not read"),
        ("adapter_config.json", {"ln_before": True}, "ln_before=True"),
        ("adapter_config.json", {"non_linearity": "mish"}, "non_linearity=mish"),
        ("adapter_config.json", {"leave_out": [3]}, "expected some of 3 layers"),
        ("adapter_config.json", {"leave_out": [2]}, "is no part of a bottleneck adapter"),
        ("adapter_config.json", {"original_ln_before": True}, "original_ln_before=True"),
        ("adapter_config.json", {"mh_adapter": False, "output_adapter": False}, "neither attention nor FFN"),
        ("adapter_config.json", {"mh_adapter": False}, "is no part of a bottleneck adapter"),
        ("head_config.json", {"head_type": "tagging"}, "no plain classification head"),
    ],
)
def test_other_forms_are_refused(bert: Encoder, tmp_path: Path, file: str, values: dict[str, Any], message: str):
    place = write_adapterhub(tiny.delta(bert, "mood", [SPECS["houlsby"]], TASK), tmp_path / "hub", bert.anatomy)
    edited(place, file, **values)
    with pytest.raises((Unsupported, FormatError), match=message):
        read_adapterhub(place, bert.anatomy, bert.ref, "x")


def test_what_adapterhub_cannot_hold(bert: Encoder, tmp_path: Path) -> None:
    for specs, task, message in (
        ([Lora()], TASK, "holds one bottleneck adapter, not lora"),
        ([SPECS["houlsby"]], replace(TASK, kind="regression", labels=()), "got regression"),
        ([SPECS["houlsby"]], replace(TASK, head="hf"), "takes bert.pooler.dense.weight from the base"),
    ):
        with pytest.raises(Unsupported, match=message):
            write_adapterhub(tiny.delta(bert, "mood", specs, task), tmp_path / "hub", bert.anatomy)
    modern = tiny.encoder("modernbert", tmp_path / "modern")
    with pytest.raises(Unsupported, match="not for modernbert"):
        write_adapterhub(tiny.delta(modern, "mood", [SPECS["houlsby"]], TASK), tmp_path / "hub", modern.anatomy)
    assert not (tmp_path / "hub").exists()


def microsoft(encoder: Encoder, path: Path, **more: torch.Tensor) -> Delta:
    """Writes a LoRA delta as ``loralib.lora_state_dict`` leaves it."""
    delta = tiny.delta(encoder, "mood", [Lora(rank=4, alpha=16)], replace(TASK, head="hf"), size=0.2)
    table = dict(delta.head)
    for slot, layer in ((slot, layer) for slot in ("query", "value") for layer in range(3)):
        start = f"roberta.{encoder.anatomy.slot(slot).paths[layer]}"
        table[f"{start}.lora_A"] = delta.tensors[f"lora.{slot}.a"][layer]
        table[f"{start}.lora_B"] = delta.tensors[f"lora.{slot}.b"][layer].T
    torch.save(table | more, path)
    return delta


def test_microsoft_lora(tmp_path: Path) -> None:
    encoder = tiny.encoder("roberta", tmp_path / "encoder")
    delta = microsoft(encoder, tmp_path / "mood.bin")
    found = convert(tmp_path / "mood.bin", encoder, "x", ConvertOptions(alpha=16, labels=TASK.labels, max_length=32))
    assert found.specs[0].scale == 4.0
    assert (logits(encoder, found) - logits(encoder, delta)).abs().max() < 1e-6
    wrong = convert(tmp_path / "mood.bin", encoder, "x", ConvertOptions(alpha=8, max_length=32))
    assert (logits(encoder, wrong) - logits(encoder, delta)).abs().max() > 1e-3
    assert wrong.task.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    with pytest.raises(SpecError, match="do not hold alpha; give --alpha"):
        convert(tmp_path / "mood.bin", encoder, "x", ConvertOptions())
    with pytest.raises(SpecError, match="2 labels were given, but the head has 3"):
        convert(tmp_path / "mood.bin", encoder, "x", ConvertOptions(alpha=8, labels=("a", "b")))
    microsoft(encoder, tmp_path / "whole.bin", **{"roberta.encoder.layer.0.output.dense.bias": torch.zeros(32)})
    with pytest.raises(FormatError, match="holds weights of the encoder too"):
        convert(tmp_path / "whole.bin", encoder, "x", ConvertOptions(alpha=8))
    torch.save({"classifier.out_proj.weight": torch.zeros(3, 32)}, tmp_path / "none.bin")
    with pytest.raises(FormatError, match=r"holds no \.\.\.lora_A"):
        convert(tmp_path / "none.bin", encoder, "x", ConvertOptions(alpha=8))
    for key in ("classifier.out_proj.weight", "roberta.encoder.layer.0.attention.self.query.lora_A"):
        microsoft(encoder, tmp_path / "number.bin", **{key: torch.tensor(1.0)})
        with pytest.raises(FormatError, match=f"holds a single number under '{key}'"):
            convert(tmp_path / "number.bin", encoder, "x", ConvertOptions(alpha=8))


def test_dora_without_its_magnitudes(bert: Encoder) -> None:
    delta = tiny.delta(bert, "mood", [Lora(("query",), rank=2, layers=(1,))], TASK)
    path = "encoder.layer.1.attention.self.query"
    weights = bert.model.state_dict()
    spelt = spelt_out(delta, {path: weights[f"{path}.weight"].norm(dim=1)}, weights, bert.anatomy)
    assert [type(spec).__name__ for spec in spelt.specs] == ["Lora", "Ia3", "Bitfit"]
    more = {path: torch.ones(32), "x": torch.ones(1)}
    for wrong, message in (({}, "missing"), ({path: torch.ones(3)}, "another width"), (more, "no update")):
        with pytest.raises(FormatError, match=message):
            spelt_out(delta, wrong, weights, bert.anatomy)


def test_what_is_no_checkpoint(bert: Encoder, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file or directory"):
        convert(tmp_path / "none", bert, "x", ConvertOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="is no adapter's directory"):
        convert(tmp_path / "empty", bert, "x", ConvertOptions())
    delta = tiny.delta(bert, "mood", [SPECS["houlsby"]], TASK)
    store.save(delta, tmp_path / "own", bert.anatomy)
    with pytest.raises(FormatError, match="is a delta of this package already"):
        convert(tmp_path / "own", bert, "x", ConvertOptions())


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    encoder = tiny.encoder("bert", Path("base"))
    store.save(tiny.delta(encoder, "mood", [SPECS["houlsby"]], TASK), Path("mood"), encoder.anatomy)
    assert main(["convert", "mood", "--to", "adapterhub", "--backbone", "base", "--out", "hub"]) == 0
    assert main(["convert", "hub", "--backbone", "base", "--out", "back", "--max-length", "32"]) == 0
    assert store.load(Path("back")).name == "back"
    assert "use_safetensors=True" in capsys.readouterr().err
    assert main(["convert", "hub", "--backbone", "base", "--out", "back"]) == 2
    assert main(["convert", "hub", "--out", "other"]) == 2
    assert "no --backbone was given" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*")
def test_whole_models_and_adapters_of_peft_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is converted is compared with what peft and transformers answer; a whole model goes where a delta does."""
    monkeypatch.chdir(tmp_path)
    tiny.save("bert", Path("base"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained("adapter")
    adapted.merge_and_unload().save_pretrained("merged")
    tiny.tokenizer().save_pretrained("merged")
    assert main(["convert", "adapter", "--backbone", "base", "--out", "a", "--labels", "bad,good"]) == 0
    assert main(["convert", "merged", "--backbone", "base", "--out", "b", "--labels", "bad,good"]) == 0
    shown = capsys.readouterr().err
    assert f"verified against peft {peft.__version__}: outputs differ by at most" in shown
    assert f"verified against transformers {transformers.__version__}: outputs differ by at most" in shown
    assert store.load(Path("b")).kinds == ("full",)
    Path("mood.jsonl").write_text('{"text": "the cat was good", "label": "LABEL_1"}\n')
    for asked in ("evaluate merged", "evaluate merged --backbone base"):
        assert main([*asked.split(), "--input", "mood.jsonl", "--json"]) == 0
    assert main("compress merged --energy 1 --out small".split()) == 2
    assert "merged does not say what it was tuned from; give --backbone" in capsys.readouterr().err
    assert main("compress merged --backbone base --rank 8 --out small".split()) == 0
    small, whole = store.load(Path("small")), store.load(Path("b"))
    found = logits(Encoder.load("base"), small) - logits(Encoder.for_delta(whole), whole)
    assert found.abs().max() < 1e-5


def test_push_and_pull_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.setattr("bertology_serve.deltas.hub.push", lambda *_, **__: "https://hub/ada/mood")
    monkeypatch.setattr("bertology_serve.deltas.hub.pull", lambda _, out, **__: out)
    assert main(["push", str(tmp_path), "ada/mood", "--private"]) == 0
    assert main(["pull", "ada/mood", "--out", "mood"]) == 0
    shown = capsys.readouterr().err
    assert "uploaded: https://hub/ada/mood" in shown
    assert "bertology-serve inspect mood" in shown
