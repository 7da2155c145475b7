"""What other exporters make of the same checkpoint, each in an environment of its own: their pins exclude ours."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bertology_serve.bench.export.export_contenders import Model, in_file
from bertology_serve.errors import Unsupported

OPTIMUM_O0, OPTIMUM_O3, OLIVE = "optimum O0", "optimum O3", "Olive"
SECONDS = 600
_OPTIMUM = """
import sys
from optimum.exporters.onnx import main_export
source, target, level = sys.argv[1:]
main_export(source, target, task="text-classification", optimize=None if level == "O0" else level, do_validation=False)
"""
_OLIVE = """
import sys
from olive.workflows import run
source, target, family = sys.argv[1:]
run({
    "input_model": {"type": "HfModel", "model_path": source, "task": "text-classification"},
    "systems": {"here": {"type": "LocalSystem", "accelerators": [
        {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}},
    "passes": {"convert": {"type": "OnnxConversion"},
               "optimise": {"type": "OrtTransformersOptimization", "model_type": family}},
    "host": "here", "target": "here", "output_dir": target, "cache_dir": target + "/cache",
})
"""


@dataclass(frozen=True)
class Tool:
    """An exporter: what it is called, a script for its own Python, and how to install it there."""

    name: str
    script: str
    argument: str
    install: str


_OPTIMUM_PINS = "torch transformers==4.57.6 'optimum-onnx[onnxruntime]==0.1.0'"
TOOLS = {
    "optimum": (Tool(OPTIMUM_O0, _OPTIMUM, "O0", _OPTIMUM_PINS), Tool(OPTIMUM_O3, _OPTIMUM, "O3", _OPTIMUM_PINS)),
    "olive": (Tool(OLIVE, _OLIVE, "bert", "torch transformers peft onnxruntime requests olive-ai==0.13.0"),),
}


def python_of(environment: Path, tool: Tool) -> Path:
    """The Python of a virtual environment; Unsupported where there is none."""
    python = environment / "bin" / "python"
    if not python.exists():
        raise Unsupported(
            f"no virtual environment for {tool.name} at {environment}; make one: "
            f"python -m venv {environment} && {python} -m pip install {tool.install}"
        )
    return python


def exported_by(tool: Tool, environment: Path, checkpoint: Path, directory: Path) -> Model:
    """The file that ``tool`` makes of a checkpoint, loaded here; Unsupported with its last line where it fails."""
    python = python_of(environment, tool).absolute()  # not resolved: the link is what makes it the environment's
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
    command = [str(python), "-c", tool.script, str(checkpoint), str(directory), tool.argument]
    try:
        done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise Unsupported(f"{tool.name} took more than {SECONDS} s to export; leave it out") from None
    if done.returncode or not (directory / "model.onnx").exists():
        said = (done.stderr.strip() or "no model.onnx").splitlines()[-1][:200]
        raise Unsupported(f"{tool.name} could not export the checkpoint: {said}; in its environment: {tool.install}")
    return in_file(tool.name, directory / "model.onnx")
