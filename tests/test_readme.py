"""The README's Python and shell run as printed, and it stays short."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
MOST_WORDS, LONGEST_PARAGRAPH = 900, 60


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _environment() -> dict[str, str]:
    """That of a user who has installed it: commands on the path, nothing where they stand."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path}


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python_of_the_readme_runs(code: str, tmp_path: Path):
    """Where nothing else lies, with the packaged MiniLM."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("up", "down")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", SHELL, ids=lambda code: code.split(maxsplit=1)[0])
def test_shell_of_the_readme_runs(code: str, tmp_path: Path):
    """Line by line, on another port than the one that is printed, in a group that ends with its server."""
    script = "set -e\n" + code.replace("8000", str(_free_port())) + "kill %1; wait || true\n"
    process = subprocess.Popen(
        ["bash", "-mc", script], cwd=tmp_path, env=_environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    [answer], _ = json.JSONDecoder().raw_decode(out[out.index("[{") :])
    assert answer["label"] == "good"
    assert (tmp_path / "films-onnx" / "onnx" / "model.onnx").is_file()


def test_there_is_code_in_the_readme():
    assert len(PYTHON) == len(SHELL) == 1
    assert len(PYTHON[0].splitlines()) <= 8


def test_the_readme_is_short():
    assert len(TEXT.split()) <= MOST_WORDS
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    paragraphs = [part for part in re.split(r"\n\s*\n|\n(?=- )", prose) if not part.lstrip().startswith("|")]
    assert max(len(part.split()) for part in paragraphs) <= LONGEST_PARAGRAPH


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXT):
        assert (ROOT / target).exists(), target
