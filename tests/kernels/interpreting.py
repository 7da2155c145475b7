"""Runs the checks of a module in Triton's interpreter, in a process of its own: it and the compiler do not share one.

A check is a function ``check_NAME(setting)`` that asserts; ``python -m tests.kernels.interpreting MODULE`` prints what
came of each as JSON. The same checks run compiled where there is a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

from tests.kernels.deltas import INTERPRETED, Setting

ROOT = Path(__file__).parents[2]


def checks(module: ModuleType) -> dict[str, Callable[[Setting], None]]:
    """The checks of a module by name."""
    return {name.removeprefix("check_"): f for name, f in vars(module).items() if name.startswith("check_")}


@cache
def interpreted(module: str) -> dict[str, str]:
    """Runs a module's checks in the interpreter: name -> "" or the traceback."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpreting", module]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return found


def main(name: str) -> None:
    """Runs the checks of one module in this process."""
    found = {}
    for check, function in checks(importlib.import_module(name)).items():
        try:
            function(INTERPRETED)
            found[check] = ""
        except Exception:
            found[check] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
