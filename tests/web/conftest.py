"""The package in ``web/``, built where ``make test-web`` has installed what that takes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WEB, HERE = Path(__file__).parents[2] / "web", Path(__file__).parent
Ask = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def built() -> Path:
    """``web/``, with ``dist`` for Node and ``demo`` for browsers."""
    npm = shutil.which("npm")
    if npm is None or not (WEB / "node_modules").is_dir():
        pytest.skip("no npm, or no web/node_modules: make test-web installs what is needed there")
    done = subprocess.run([npm, "run", "--silent", "build"], cwd=WEB, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return WEB


@pytest.fixture
def ask(built: Path, tmp_path: Path) -> Ask:
    """Asks an export in Node: the answers to each list of requests, or what it was refused with."""

    def asked(export: Path, *batches: list[Any]) -> list[Any]:
        (tmp_path / "requests.json").write_text(json.dumps(batches), encoding="utf-8")
        command = ["node", HERE / "answers.mjs", built / "dist" / "index.js", export, tmp_path / "requests.json"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found: list[Any] = json.loads(done.stdout)
        return found

    return asked
