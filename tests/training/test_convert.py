"""Checkpoints of other libraries; ``adapters`` does not run beside this transformers, so its layout is written out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bertology_serve.cli.main import main
from bertology_serve.deltas import store
from bertology_serve.deltas.adapterhub import _factor, read_adapterhub, write_adapterhub
from bertology_serve.deltas.bottleneck import AdapterSpec
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.dora import spelt_out
from bertology_serve.deltas.lora import LoraSpec
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import FormatError, NotFound, SpecError, Unsupported
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.training.convert import Told, convert
from tests import tiny

TASK = TaskSpec("classification", ("bad", "good", "none"), 32, head="linear")
SPECS = {
    "houlsby": AdapterSpec(width=5),
    "attention": AdapterSpec(width=4, after="attention", activation="gelu"),
    "pfeiffer": AdapterSpec("pfeiffer", width=8, drop_lowest=1),
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
    back = convert(tmp_path / "hub", encoder, "again", Told(max_length=32))
    assert (back.specs, back.task) == (delta.specs, delta.task)
    assert torch.equal(logits(encoder, back), logits(encoder, delta))


def test_names_and_shapes_are_those_of_adapters(bert: Encoder, tmp_path: Path) -> None:
    """As adapters 1.3.0 writes them for a BertAdapterModel; up is a linear's weight there."""
    from safetensors.torch import load_file

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


def test_every_width_has_its_reduction_factor() -> None:
    for hidden in (32, 384, 768, 1024):
        assert [hidden // _factor(hidden, width) for width in range(1, 300)] == list(range(1, 300))


def test_pickles_are_opened_when_converting(bert: Encoder, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    delta = tiny.delta(bert, "mood", [SPECS["houlsby"]], TASK)
    place = write_adapterhub(delta, tmp_path / "hub", bert.anatomy)
    for safe, pickled in (("adapter", "pytorch_adapter"), ("model_head", "pytorch_model_head")):
        torch.save(load_file(place / f"{safe}.safetensors"), place / f"{pickled}.bin")
        (place / f"{safe}.safetensors").unlink()
    back = convert(place, bert, "again", Told(max_length=32, labels=("x", "y", "z")))
    assert back.task.labels == ("x", "y", "z")
    assert torch.equal(logits(bert, back), logits(bert, delta))
    torch.save({"x": print}, place / "pytorch_adapter.bin")
    with pytest.raises(FormatError, match="holds more than tensors"):
        convert(place, bert, "again", Told())


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
        ("adapter_config.json", {"leave_out": [2]}, "only the lowest layers"),
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
        ([LoraSpec()], TASK, "holds one bottleneck adapter, not lora"),
        ([SPECS["houlsby"]], replace(TASK, kind="regression", labels=()), "not regression"),
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
    delta = tiny.delta(encoder, "mood", [LoraSpec(rank=4, alpha=16)], replace(TASK, head="hf"), size=0.2)
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
    found = convert(tmp_path / "mood.bin", encoder, "x", Told(alpha=16, labels=TASK.labels, max_length=32))
    assert found.specs[0].scale == 4.0
    assert (logits(encoder, found) - logits(encoder, delta)).abs().max() < 1e-6
    wrong = convert(tmp_path / "mood.bin", encoder, "x", Told(alpha=8, max_length=32))
    assert (logits(encoder, wrong) - logits(encoder, delta)).abs().max() > 1e-3
    assert wrong.task.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    with pytest.raises(SpecError, match="do not hold alpha; give --alpha"):
        convert(tmp_path / "mood.bin", encoder, "x", Told())
    with pytest.raises(SpecError, match="2 labels were given, but the head has 3"):
        convert(tmp_path / "mood.bin", encoder, "x", Told(alpha=8, labels=("a", "b")))
    microsoft(encoder, tmp_path / "whole.bin", **{"roberta.encoder.layer.0.output.dense.bias": torch.zeros(32)})
    with pytest.raises(FormatError, match="holds weights of the encoder too"):
        convert(tmp_path / "whole.bin", encoder, "x", Told(alpha=8))
    torch.save({"classifier.out_proj.weight": torch.zeros(3, 32)}, tmp_path / "none.bin")
    with pytest.raises(FormatError, match=r"holds no \.\.\.lora_A"):
        convert(tmp_path / "none.bin", encoder, "x", Told(alpha=8))
    for key in ("classifier.out_proj.weight", "roberta.encoder.layer.0.attention.self.query.lora_A"):
        microsoft(encoder, tmp_path / "number.bin", **{key: torch.tensor(1.0)})
        with pytest.raises(FormatError, match=f"holds a single number under '{key}'"):
            convert(tmp_path / "number.bin", encoder, "x", Told(alpha=8))


def test_dora_without_its_magnitudes(bert: Encoder) -> None:
    delta = tiny.delta(bert, "mood", [LoraSpec(("query",), rank=2, layers=(1,))], TASK)
    path = "encoder.layer.1.attention.self.query"
    weights = bert.model.state_dict()
    spelt = spelt_out(delta, {path: weights[f"{path}.weight"].norm(dim=1)}, weights, bert.anatomy)
    assert [type(spec).__name__ for spec in spelt.specs] == ["LoraSpec", "Ia3Spec", "BitfitSpec"]
    more = {path: torch.ones(32), "x": torch.ones(1)}
    for wrong, message in (({}, "missing"), ({path: torch.ones(3)}, "another width"), (more, "no update")):
        with pytest.raises(FormatError, match=message):
            spelt_out(delta, wrong, weights, bert.anatomy)


def test_what_is_no_checkpoint(bert: Encoder, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file or directory"):
        convert(tmp_path / "none", bert, "x", Told())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="is no adapter's directory"):
        convert(tmp_path / "empty", bert, "x", Told())
    delta = tiny.delta(bert, "mood", [SPECS["houlsby"]], TASK)
    store.save(delta, tmp_path / "own", bert.anatomy)
    with pytest.raises(FormatError, match="is a delta of this package already"):
        convert(tmp_path / "own", bert, "x", Told())


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


def test_push_and_pull_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.setattr("bertology_serve.deltas.hub.push", lambda *_, **__: "https://hub/ada/mood")
    monkeypatch.setattr("bertology_serve.deltas.hub.pull", lambda _, out, **__: out)
    assert main(["push", str(tmp_path), "ada/mood", "--private"]) == 0
    assert main(["pull", "ada/mood", "--out", "mood"]) == 0
    shown = capsys.readouterr().err
    assert "uploaded: https://hub/ada/mood" in shown
    assert "bertology-serve inspect mood" in shown
