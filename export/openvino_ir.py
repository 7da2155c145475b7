"""OpenVINO, imported when it is needed: a graph becomes its own format (IR), in 8 bits too, and a session runs that."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray

from bertology_serve.errors import Unsupported, VerificationError
from bertology_serve.export.export_directory import save
from bertology_serve.export.session import Session

SMOOTHING = 0.8
"""How much of a column's size moves into the weights."""
Arrays = Mapping[str, NDArray[np.generic]]


def save_ir(model: onnx_ir.Model, path: Path, texts: Sequence[Arrays] = ()) -> int:
    """Writes the file and the ``.bin`` beside it; returns the bytes of both.

    With ``texts``, inputs by name, products are in 8 bits; what they read has the scale that the texts give it. Raises
    Unsupported without OpenVINO or NNCF, VerificationError for a graph that OpenVINO cannot read.
    """
    openvino = _imported("openvino")
    with TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        save(model, source)
        graph = _loaded(openvino, openvino.Core().read_model, source)
        graph = _in_8_bits(graph, texts) if texts else graph
        for number, node in enumerate(graph.get_ordered_ops()):  # their own names count up as long as a process lives
            if node.get_type_name() != "Parameter":
                node.set_friendly_name(f"{node.get_type_name()}_{number}")
        openvino.save_model(graph, path, compress_to_fp16=False)
    return sum(file.stat().st_size for file in (path, path.with_suffix(".bin")))


def _in_8_bits(graph: Any, texts: Sequence[Arrays]) -> Any:
    """NNCF's post-training quantisation, all linears and products of attention; word embeddings stay as they are.

    Ranges of all texts and ``SMOOTHING`` are nearer to float32 than NNCF's own choice.
    Correcting biases takes as long again and changes nothing.
    """
    os.environ.setdefault("NNCF_CI", "1")  # else it tells its makers of each use
    nncf = _imported("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)  # its own function sets the level of every handler
    ranges = import_module("nncf.quantization.range_estimator").RangeEstimatorParametersSet.MINMAX
    smooth = import_module("nncf.quantization.advanced_parameters").AdvancedSmoothQuantParameters(matmul=SMOOTHING)
    with redirect_stdout(io.StringIO()):  # bars of progress
        return nncf.quantize(
            graph,
            nncf.Dataset(texts),
            subset_size=len(texts),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(types=["Gather"]),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                disable_bias_correction=True,
                activations_range_estimator_params=ranges,
                smooth_quant_alphas=smooth,
            ),
        )


class OpenVinoSession(Session):
    """A loaded file of OpenVINO's, on the CPU, in float32 where the file is: left to itself, OpenVINO computes in
    bfloat16 where the processor can.

    Raises Unsupported without OpenVINO, VerificationError where it cannot load the file.
    """

    def __init__(self, path: Path) -> None:
        openvino = _imported("openvino")
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self._session = _loaded(openvino, openvino.Core().compile_model, path, "CPU", settings)
        self.asked = self.provider = "CPU"
        self.runtime = f"openvino {_version(openvino)}"
        self.inputs = tuple(one.any_name for one in self._session.inputs)

    def outputs(self, arrays: Arrays) -> dict[str, NDArray[np.float32]]:
        found = self._session({name: arrays[name] for name in self.inputs})
        return {name: found[one] for one in self._session.outputs for name in one.names}


def _loaded(openvino: ModuleType, load: Callable[..., Any], path: Path, *settings: Any) -> Any:
    try:
        return load(str(path), *settings)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise VerificationError(f"OpenVINO {_version(openvino)} cannot load the file: {reason}") from error


def _version(openvino: ModuleType) -> str:
    """Without the build."""
    return str(openvino.__version__).partition("-")[0]


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError:
        raise Unsupported(
            f"{name} is not installed, which --target openvino needs; pip install 'bertology-serve[openvino]'"
        ) from None
