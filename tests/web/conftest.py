"""The package in ``web/``, built where ``make test-web`` has installed what that takes."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bertology_serve.export import exporting
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import export_many
from tests import tiny
from tests.export.emitter.mixed import EVERY
from tests.web.requests import DECODED

WEB, HERE = Path(__file__).parents[2] / "web", Path(__file__).parent


@pytest.fixture(scope="session")
def built() -> Path:
    """``web/``, with ``dist`` for Node and ``demo`` for browsers."""
    npm = shutil.which("npm")
    if npm is None or not (WEB / "node_modules").is_dir():
        pytest.skip("no npm, or no web/node_modules: make test-web installs what is needed there")
    done = subprocess.run([npm, "run", "--silent", "build"], cwd=WEB, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return WEB


@dataclass(frozen=True)
class Ask:
    """Asks exports in Node: for each list of requests the answers, or why it was refused; and the files read so far."""

    web: Path
    folder: Path

    def __call__(self, export: Path, *batches: list[Any]) -> list[Any]:
        return self.each([export], *batches)[0]

    def each(self, exports: list[Path], *batches: list[Any]) -> list[list[Any]]:
        (self.folder / "requests.json").write_text(json.dumps(batches), encoding="utf-8")
        command = [
            "node",
            HERE / "answers.mjs",
            self.web / "dist" / "index.js",
            self.folder / "requests.json",
            *exports,
        ]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found: list[list[Any]] = json.loads(done.stdout)
        return found


@pytest.fixture
def ask(built: Path, tmp_path: Path) -> Ask:
    return Ask(built, tmp_path)


NAMES = ("lora", "folds", "pfeiffer", "pairs", "words", "prompted")


@pytest.fixture(scope="session")
def export(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder with the base and these deltas."""
    folder = tmp_path_factory.mktemp("refused")
    encoder = tiny.encoder("bert", folder / "encoder")
    with pytest.MonkeyPatch.context() as patched:
        real = exporting.built_in
        patched.setattr(exporting, "built_in", lambda tokenizer, longest: list(real(tokenizer, longest))[::12])
        made = [tiny.delta(encoder, name, *(EVERY | DECODED)[name]) for name in NAMES]
        export_many(encoder, made, folder / "out", ExportSpec(layout="web"))
    return folder / "out"
