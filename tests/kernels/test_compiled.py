"""Machine code for GPUs that are not there: no spilled registers, and matrix instructions where there should be some.

The suite compiles the heaviest configurations of each tile shape; ``python -m tests.kernels.compiling`` does them all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from bertology_serve.kernels.tuning import Config
from tests.kernels.compiling import BIN, ROOT, compiled, heaviest, linear_job, others

MATRIX = {80: "HMMA", 90: "HGMMA"}
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have


@pytest.fixture(scope="module", autouse=True)
def _tools():
    assert (Path(triton.__file__).parent / BIN / "cuobjdump").is_file(), "the triton wheel has no cuobjdump"


@pytest.mark.parametrize("arch", [80, 90])
def test_shipped_configurations_do_not_spill_and_use_matrix_instructions(arch):
    jobs = [*heaviest(arch), *others(arch)]
    reports = compiled(jobs)
    assert len(reports) == len(jobs) >= 8
    wrong = [report for report in reports if report.spills or report.serialised or report.shared > SHARED[arch]]
    assert wrong == []
    for job, report in zip(jobs, reports, strict=True):
        multiplies = "BM" in job.constants and "RT" in job.constants
        assert report.counts[MATRIX[arch] if multiplies and job.dtype == "bf16" else "FFMA"] > 0 or not multiplies
        assert (report.counts["UTMALDG"] > 0) == bool(job.constants.get("TMA")), report


def test_the_report_sees_a_spill():
    [report] = compiled([linear_job(80, Config(128, 128, 32, 32, 1, 2, 2), "bf16", 1, 0)])
    assert report.spills


def test_the_report_sees_serialised_instructions():
    """Which an overfull tile costs, and why OVERFLOW is a constant of the launch."""
    config = Config(64, 64, 64, 16, 1, 4, 4, True)
    plain, overfull = compiled([linear_job(90, config, "bf16", 1, 1, overflow=over) for over in (False, True)])
    assert (plain.serialised, overfull.serialised) == (False, True)


def test_launches_compile_as_the_host_functions_make_them(tmp_path):
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.launching"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    launched = json.loads(run.stdout.splitlines()[-1])
    names = {name.removesuffix("_kernel") for name, _ in launched}
    assert names == {
        "fused_lora_linear", "shrink", "expand", "pool_gradient", "bottleneck", "layer_norm"
    }  # fmt: skip
    linears = [constants for name, constants in launched if name == "fused_lora_linear_kernel"]
    assert [(c["LORA"], c["SLICES"], c["TMA"], c["PDL"]) for c in linears] == [
        (1, 1, True, False), (0, 1, False, False), (1, 3, True, False), (2, 1, True, True),  # as asked
        (1, 1, True, False), (1, 1, False, False),  # forward, and the gradient of x
    ]  # fmt: skip
