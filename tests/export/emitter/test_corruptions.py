"""Exports for many deltas that were damaged: one clear line when a delta is to join, and nothing is touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from bertology_serve.cli.main import main
from bertology_serve.deltas import store
from bertology_serve.export.delta_library import CARDS, FILE
from bertology_serve.kinds.lora import Lora
from tests import tiny
from tests.export.cases import CLASSES, EVERYTHING
from tests.export.corruptions import FILES

MODEL = "onnx/model.onnx"


def _stacks(change: Callable[[dict[str, np.ndarray], dict[str, str]], Any], directory: Path) -> None:
    with safe_open(directory / FILE, "np") as file:
        arrays, facts = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    change(arrays, facts)
    save_file(arrays, directory / FILE, facts)


def _every(change: Callable[[np.ndarray], np.ndarray], arrays: dict[str, np.ndarray], _: dict[str, str]) -> None:
    arrays |= {name: np.ascontiguousarray(change(array)) for name, array in arrays.items()}


def _gone(part: str, arrays: dict[str, np.ndarray], _: dict[str, str]) -> None:
    for name in [name for name in arrays if part in name]:
        del arrays[name]


def _cards(change: Callable[[list[dict[str, Any]]], Any], _: dict[str, np.ndarray], facts: dict[str, str]) -> None:
    cards = json.loads(facts[CARDS])
    facts[CARDS] = json.dumps(change(cards) or cards)


def _facts(change: Callable[[dict[str, str]], Any], directory: Path) -> None:
    model = onnx_ir.load(directory / MODEL)
    change(model.metadata_props)
    onnx_ir.save(model, directory / MODEL)


EVERY: dict[str, Callable[[Path], Any]] = {
    **{f"{name} {what}": partial(lambda change, name, place: change(place / name), change, name)
       for name in (FILE, MODEL) for what, change in FILES.items()},
    "stacks with a dimension too many": partial(_stacks, partial(_every, lambda array: array[None])),
    "stacks that are flat": partial(_stacks, partial(_every, np.ravel)),
    "stacks of bytes": partial(_stacks, partial(_every, lambda array: array.astype(np.uint8))),
    "stacks cut in width": partial(_stacks, partial(_every, lambda array: array[..., :-1])),
    **{f"no array called {part}": partial(_stacks, partial(_gone, part))
       for part in ("query", "value", "prompt", "prefix", "head", ".")},
    "no cards": partial(_stacks, lambda _, facts: facts.clear()),
    "cards that are no list": partial(_stacks, partial(_cards, lambda cards: {"cards": 3})),
    "cards of another form": partial(_stacks, partial(_cards, lambda cards: cards[0].pop("labels") and None)),
    "cards with more": partial(_stacks, partial(_cards, lambda cards: cards[0].update(colour="red"))),
    "no metadata in the graph": partial(_facts, lambda facts: facts.clear()),
    "a graph of another base": partial(_facts, lambda facts: facts.update(base_sha256="0" * 64)),
    "a graph of no precision": partial(_facts, lambda facts: facts.pop("precision")),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """An export with one delta of every kind, and another delta that may join it."""
    directory = tmp_path_factory.mktemp("many")
    encoder = tiny.encoder("bert", directory / "base")
    for name, specs in (("first", EVERYTHING), ("second", [Lora(rank=2)])):
        delta = tiny.delta(encoder, name, specs, CLASSES)
        store.save(delta, directory / name, encoder.anatomy, encoder.config.to_dict())
    first, base, out = (str(directory / name) for name in ("first", "base", "out"))
    assert main(["export", "--multi", first, "--backbone", base, "--out", out]) == 0
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", EVERY)
def test_nothing_joins_what_is_damaged(name, sound, tmp_path, capsys):
    out = tmp_path / "site" / "out"
    shutil.copytree(sound / "out", out)
    EVERY[name](out)
    before = contents(out)
    capsys.readouterr()
    named = [str(sound / "second"), "--backbone", str(sound / "base"), "--out", str(out)]
    code = main(["export", "--multi", "--join", *named])
    printed, said = capsys.readouterr()
    assert code in (1, 2), said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "unexpected" not in said.partition(":")[2][:12]
    assert printed == ""
    assert contents(out) == before
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["out"]
