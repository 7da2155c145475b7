from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertology_serve.deltas import store
from bertology_serve.deltas.delta import BaseRef, Delta
from bertology_serve.errors import BaseMismatch, BertologyError, FormatError, NotFound
from bertology_serve.kinds.slots import Anatomy
from tests.deltas import samples

WEIGHTS = "adapter_model.safetensors"


def saved(directory: Path, delta: Delta | None = None, family: str = "bert", overwrite: bool = False) -> Path:
    delta = delta or samples.delta(family, samples.SPECS["lora"])
    return store.save(delta, directory, samples.anatomy(family), samples.options(family), overwrite=overwrite)


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v3"])
@pytest.mark.parametrize("kind", samples.SPECS)
def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path, family: str, kind: str) -> None:
    delta = samples.delta(family, samples.SPECS[kind])
    saved(tmp_path / "x", delta, family)
    assert samples.same(store.load(tmp_path / "x"), delta)
    assert samples.same(store.load(tmp_path / "x", samples.anatomy(family)), delta)


def test_a_delta_that_cannot_take_anothers_place_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was gone before the new one came; and where other things lie beside it, they stay."""
    first, second = (samples.delta("bert", samples.SPECS[kind]) for kind in ("lora", "bitfit"))
    saved(tmp_path / "x", first)
    rename = os.rename
    monkeypatch.setattr("bertology_serve.files._exchanged", lambda one, other: False)

    def fails(one: Path, other: Path) -> None:
        if Path(other).name == "x" and Path(one).name.endswith(".tmp"):
            raise OSError(28, "No space left on device")
        rename(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        with pytest.raises(FormatError, match="No space left on device"):
            saved(tmp_path / "x", second, overwrite=True)
    assert samples.same(store.load(tmp_path / "x"), first)
    saved(tmp_path / "x", second, overwrite=True)
    assert samples.same(store.load(tmp_path / "x"), second)
    (tmp_path / "x" / "log.jsonl").write_text("{}")
    saved(tmp_path / "x", first, overwrite=True)
    assert samples.same(store.load(tmp_path / "x"), first)
    assert (tmp_path / "x" / "log.jsonl").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("task", samples.TASKS)
def test_every_task_comes_back(tmp_path: Path, task: str) -> None:
    delta = replace(samples.delta("electra", samples.SPECS["all"], samples.TASKS[task]), metrics={"f1": 0.5})
    saved(tmp_path / "x", delta, "electra")
    assert samples.same(store.load(tmp_path / "x"), delta)


def test_full_weights_stand_beside_in_their_own_precision(tmp_path: Path) -> None:
    weights = {"encoder.a.weight": torch.randn(3, 2), "encoder.b.weight": torch.randn(4).bfloat16()}
    delta = replace(samples.delta("bert", ()), weights=weights)
    saved(tmp_path / "x", delta)
    assert load_file(tmp_path / "x/model.safetensors").keys() == weights.keys()
    assert samples.same(store.load(tmp_path / "x"), delta)
    assert store.load(tmp_path / "x").kinds == ("full",)


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    delta = samples.delta("bert", samples.SPECS["lora"])
    shared = torch.zeros(2, 3, 3, 32)
    delta = replace(delta, tensors={**delta.tensors, "lora.query.b": shared[0], "lora.value.b": shared[1]})
    assert samples.same(store.load(saved(tmp_path / "x", delta)), delta)


def test_the_directory_holds_what_the_format_says(tmp_path: Path) -> None:
    saved(tmp_path / "lora")
    saved(tmp_path / "own", samples.delta("bert", samples.SPECS["houlsby"]))
    files = {"README.md", "delta.json", WEIGHTS}
    assert set(os.listdir(tmp_path / "lora")) == files | {"adapter_config.json"}
    assert set(os.listdir(tmp_path / "own")) == files
    assert set(os.listdir(tmp_path)) == {"lora", "own"}
    assert len({path.stat().st_mode for path in (tmp_path / "lora").iterdir()}) == 1  # as readable as the others
    values = json.loads((tmp_path / "lora/delta.json").read_text())
    assert values["format"] == 1
    assert values["files"][WEIGHTS]["sha256"] == hashlib.sha256((tmp_path / "lora" / WEIGHTS).read_bytes()).hexdigest()


def test_versions(tmp_path: Path) -> None:
    bare = saved(tmp_path / "anywhere")
    assert store.load(bare).version == hashlib.sha256((bare / "delta.json").read_bytes()).hexdigest()[:12]
    assert store.load(saved(tmp_path / "sample" / "7")).version == "7"


def test_relative_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "sample" / "v1")
    monkeypatch.chdir(tmp_path / "sample" / "v1")
    assert store.load(Path(".")).version == "v1"


def test_saving_again_changes_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path / "x")
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    saved(path)
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_another_delta_is_replaced_only_on_demand(tmp_path: Path) -> None:
    path = saved(tmp_path / "x")
    other = samples.delta("bert", samples.SPECS["houlsby"])
    with pytest.raises(FormatError, match="holds another delta already"):
        saved(path, other)
    assert store.load(path).kinds == ("lora",)
    (path / "log.jsonl").write_text("{}")
    saved(path, other, overwrite=True)
    assert store.load(path).kinds == ("adapter",)
    assert set(os.listdir(path)) == {"README.md", "delta.json", WEIGHTS, "log.jsonl"}


def test_a_damaged_copy_is_repaired_by_saving_again(tmp_path: Path) -> None:
    path = saved(tmp_path / "x")
    (path / WEIGHTS).write_bytes(b"")
    saved(path)
    assert store.load(path).kinds == ("lora",)


def test_other_files_in_the_directory_stay(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("{}")
    saved(tmp_path / "run")
    assert (tmp_path / "run/log.jsonl").read_text() == "{}"
    assert store.load(tmp_path / "run").kinds == ("lora",)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    for path in (tmp_path / "x", tmp_path / "x" / "y"):
        with pytest.raises(FormatError, match=r"expected a directory|cannot write"):
            saved(path)


@pytest.mark.parametrize("step", range(12))
def test_nothing_half_written_stands_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The power fails at each flush in turn, also while files are moved into a directory that exists."""
    count = 0

    def flush(path: Path, real: Callable[[Path], None] = store.flush) -> None:
        nonlocal count
        count += 1
        if count > step:
            raise OSError("power failure")
        real(path)

    monkeypatch.setattr(store, "flush", flush)
    for path in (tmp_path / "new", tmp_path / "old"):
        path == tmp_path / "old" and path.mkdir()
        count = 0
        try:
            saved(path)
        except FormatError:
            assert not (path / "delta.json").exists() or samples.same(
                store.load(path), samples.delta("bert", samples.SPECS["lora"])
            )
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("moves", range(5))
def test_a_crash_between_moves_leaves_no_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    path, count, real = saved(tmp_path / "x"), 0, Path.replace

    def move(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count > moves:
            raise OSError("power failure")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", move)
    other = samples.delta("bert", samples.SPECS["lora"], seed=1)
    with contextlib.suppress(FormatError):
        saved(path, other, overwrite=True)
    if (path / "delta.json").exists():
        assert samples.same(store.load(path), other)
    else:
        with pytest.raises(FormatError):
            store.load(path, samples.anatomy("bert"), base=samples.base("bert"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: replace(d, name="../x"), "cannot be used"),
        (lambda d: replace(d, name="base"), "taken by the encoder"),
        (lambda d: replace(d, tensors={}), "'lora.query.a' is missing"),
        (lambda d: replace(d, tensors=d.tensors | {"lora.key.a": torch.zeros(1)}), "did you mean"),
        (lambda d: replace(d, tensors=d.tensors | {"lora.query.a": torch.zeros(3, 3, 31)}), r"shape \[3, 3, 31\]"),
        (lambda d: replace(d, tensors=d.tensors | {"lora.query.a": torch.full((3, 3, 32), torch.nan)}), "NaN"),
        (lambda d: replace(d, tensors={n: t.double() for n, t in d.tensors.items()}), "float64; expected torch.f"),
        (lambda d: replace(d, head={}), "the head lacks"),
        (lambda d: replace(d, head=d.head | {"classifier.weight": torch.zeros(2, 32)}), r"\[2, 32\]; expected \[3,"),
        (lambda d: replace(d, weights={"a": torch.zeros(2, dtype=torch.int64)}), "int64"),
        (lambda d: replace(d, provenance={"a": object()}), "cannot hold the provenance"),
    ],
)
def test_a_delta_that_could_not_be_read_is_not_written(
    tmp_path: Path, change: Callable[[Delta], Delta], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        saved(tmp_path / "x", change(samples.delta("bert", samples.SPECS["lora"])))
    assert not os.listdir(tmp_path)


def edit(path: Path, old: str, new: str) -> None:
    text = (path / "delta.json").read_text()
    assert old in text
    (path / "delta.json").write_text(text.replace(old, new))


def tamper(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors and corrects the hash, as an attacker would."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)
    values = json.loads((path / "delta.json").read_text())
    data = (path / WEIGHTS).read_bytes()
    values["files"][WEIGHTS] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "delta.json").write_text(json.dumps(values))


HEAD = "base_model.model.classifier.weight"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-9]), "truncated"),
    "changed": (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-1] + b"\0"), "delta.json expects"),
    "gone": (lambda p: (p / WEIGHTS).unlink(), "No such file"),
    "linked": (lambda p: ((p / WEIGHTS).unlink(), (p / WEIGHTS).symlink_to("/etc/hostname")), "points outside"),
    "fifo": (lambda p: ((p / WEIGHTS).unlink(), os.mkfifo(p / WEIGHTS)), "no regular file"),
    "pickle": (lambda p: (p / WEIGHTS).write_bytes(pickle.dumps({})), "truncated|claims"),
    "json": (lambda p: (p / "delta.json").write_bytes(b"\x80\x04"), "not valid JSON"),
    "unknown": (lambda p: edit(p, '"rank"', '"rang"'), "did you mean 'rank'"),
    "rank": (lambda p: edit(p, '"rank": 3', '"rank": 4'), r"expected \[3, 4, 32\]"),
    "huge": (lambda p: edit(p, '"rank": 3', '"rank": 900719925474099'), "tensor 'lora.query.|do not fit"),
    "layers": (lambda p: edit(p, '"layers": 3,', '"layers": 2,'), "one a layer|has shape"),
    "labels": (lambda p: edit(p, '"good",', ""), r"shape \[3, 32\]; expected \[2, 32\]"),
    "name": (lambda p: edit(p, '"sample"', '"../../x"'), "cannot be used"),
    "target": (lambda p: edit(p, '"query",', '"final_norm",'), "has no slot|no linear"),
    "extra": (lambda p: tamper(p, lambda t: t.update(evil=torch.zeros(1))), "unknown tensor 'evil'"),
    "missing": (lambda p: tamper(p, lambda t: t.pop(HEAD)), "'base_model.model.classifier.weight' is missing"),
    "shape": (lambda p: tamper(p, lambda t: t.update({HEAD: torch.zeros(3, 31)})), r"\[3, 31\]; expected \[3, 32\]"),
    "dtype": (lambda p: tamper(p, lambda t: t.update({HEAD: torch.zeros(3, 32).long()})), "dtype 'I64'"),
    "nan": (lambda p: tamper(p, lambda t: t[HEAD].fill_(torch.nan)), "NaN"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_directory_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    path = saved(tmp_path / "x")
    change, message = HOSTILE[case]
    change(path)
    with pytest.raises(FormatError, match=message) as caught:
        store.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_half_precision_on_disk_is_read_as_float32(tmp_path: Path) -> None:
    path = saved(tmp_path / "x")
    tamper(path, lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    delta = store.load(path)
    assert {tensor.dtype for tensor in (*delta.tensors.values(), *delta.head.values())} == {torch.float32}


def test_no_directory_and_no_delta(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no directory"):
        store.load(tmp_path / "x")
    with pytest.raises(FormatError, match=r"is no delta: it lacks delta\.json"):
        store.load(tmp_path)


def test_a_whole_model_is_told_where_to_go(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(FormatError, match="holds a whole model; make a delta of it with bertology-serve convert or"):
        store.load(tmp_path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(FormatError, match=r"holds adapter_model.bin, a pickle.*convert it with"):
        store.load(tmp_path, samples.anatomy("bert"), base=samples.base("bert"))


def test_limits_are_the_callers(tmp_path: Path) -> None:
    path = saved(tmp_path / "x")
    for limits in (store.Limits(json_bytes=9), store.Limits(file_bytes=9), store.Limits(tensors=3)):
        with pytest.raises(FormatError, match="at most"):
            store.load(path, limits=limits)


def test_other_weights_are_refused_by_name_and_hash() -> None:
    delta = samples.delta("bert", ())
    store.check_base(delta, BaseRef("renamed", "ab" * 32, "bert"))
    with pytest.raises(BaseMismatch, match=r"for tiny-bert \(weights (ab){6}\), but the encoder is other \(weights cd"):
        store.check_base(delta, BaseRef("other", "cd" * 32, "bert"))


@pytest.mark.parametrize(
    ("anatomy", "message"),
    [
        (samples.anatomy("roberta"), "with family bert; this encoder has roberta"),
        (replace(samples.anatomy("bert"), layers=6), "with layers 3; this encoder has 6"),
        (replace(samples.anatomy("bert"), slots={}), "projections have other shapes"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(tmp_path: Path, anatomy: Anatomy, message: str) -> None:
    path = saved(tmp_path / "x")
    with pytest.raises(BaseMismatch, match=message):
        store.load(path, anatomy)


def test_a_copied_directory_is_the_same_delta(tmp_path: Path) -> None:
    path = saved(tmp_path / "x")
    shutil.copytree(path, tmp_path / "y")
    assert store.load(tmp_path / "y").version == store.load(path).version


def test_every_error_is_one_of_ours(tmp_path: Path) -> None:
    """Each byte of delta.json in turn becomes another: read as before, or refused."""
    path = saved(tmp_path / "x", samples.delta("bert", samples.SPECS["prompt"]))
    data = (path / "delta.json").read_bytes()
    for at in range(0, len(data), 11):
        (path / "delta.json").write_bytes(data[:at] + b"9" + data[at + 1 :])
        with contextlib.suppress(BertologyError):
            store.load(path)
