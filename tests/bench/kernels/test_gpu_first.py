"""The script of the first figures on a GPU, rehearsed in Triton's interpreter: every step has rows, and none failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = "benchmarks/gpu_first.py"


def _run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, SCRIPT, "--out", str(out), *options]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def _rows(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "gpu_first.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    run = _run(folder, "--small", "--device", "cpu")
    assert run.returncode == 0, run.stderr
    return folder


def test_every_step_has_rows_and_none_failed(out):
    rows = _rows(out)
    assert [row for row in rows if "failed" in row] == []
    steps = {row["step"] for row in rows}
    assert steps == {"machine", "correct", "table", "product", "taken_apart", "encoders", "training", "rest"}
    checked = [row for row in rows if row["step"] == "correct"]
    assert {row["name"] for row in checked} >= {"ours", "fused", "split", "overfull", "whole pass, eager"}
    assert all(row["right"] for row in checked)


def test_rows_become_a_table_and_a_plot(out):
    run = _run(out, "--render")
    assert run.returncode == 0, run.stderr
    text = (out / "gpu_first.md").read_text()
    assert "## taken apart" in text
    assert text.count("| whole pass, eager |") == 1
    assert (out / "gpu_first.png").stat().st_size > 10_000


def test_the_limit_stops_it_and_what_was_measured_stays(tmp_path):
    run = _run(tmp_path, "--small", "--device", "cpu", "--limit", "0")
    assert run.returncode == 0, run.stderr
    rows = _rows(tmp_path)
    assert len(rows) == 3
    assert "as --limit asks" in str(rows[-1]["stopped"])


def test_without_a_gpu_it_says_how_to_rehearse(tmp_path):
    run = _run(tmp_path)
    if "torch sees no GPU" not in run.stderr:
        pytest.skip("there is a GPU here")
    assert run.returncode == 2
    assert "--small --device cpu" in run.stderr
