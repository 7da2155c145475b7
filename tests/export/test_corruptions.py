"""Whatever is wrong with what is exported: one clear line, no fault, nothing published."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bertology_serve.cli.main import main
from bertology_serve.deltas import store
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from tests import tiny
from tests.export.cases import CLASSES
from tests.export.corruptions import corruptions

EVERY = corruptions()
KINDS = [Lora(rank=2), Bitfit(), Adapter(width=3), Prompt(2), Prefix(2)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A directory with a delta of every kind and its base, nothing wrong with them."""
    directory = tmp_path_factory.mktemp("sound")
    encoder = tiny.encoder("bert", directory / "base")
    delta = tiny.delta(encoder, "mood", KINDS, CLASSES)
    store.save(delta, directory / "delta", encoder.anatomy, encoder.config.to_dict())
    return directory


def export(directory: Path) -> int:
    """The command on the delta and base of a directory; what it publishes goes to ``site/out``."""
    (directory / "site").mkdir()
    delta, base, out = (str(directory / name) for name in ("delta", "base", "site/out"))
    return main(["export", "--merge", "--bake", delta, "--backbone", base, "--out", out])


def test_there_are_enough_of_them():
    assert len(EVERY) >= 200


def test_what_is_sound_is_exported(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "here")
    assert export(tmp_path / "here") == 0
    assert (tmp_path / "here" / "site" / "out" / "onnx" / "model.onnx").exists()


@pytest.mark.parametrize("name", EVERY)
def test_what_is_not_is_refused_in_one_line(name, sound, tmp_path, capsys):
    here = tmp_path / "here"
    shutil.copytree(sound, here)
    EVERY[name](here / "delta", here / "base")
    capsys.readouterr()
    code = export(here)
    printed, said = capsys.readouterr()
    assert code in (1, 2), said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "unexpected" not in said.partition(":")[2][:12]
    assert printed == ""
    assert list((here / "site").iterdir()) == []
