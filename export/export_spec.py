"""How a delta is exported. Imports nothing heavy: the command line reads its defaults from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from bertology_serve.config_fields import option
from bertology_serve.errors import SpecError

Precision = Literal["fp32", "fp16", "int8-row", "int8-nbits", "int8-dynamic", "int8-static"]
MultiPrecision = Literal["fp32", "int8-row"]
"""Of graphs for many deltas."""
DRIFT: dict[Precision, float] = {
    "fp16": 0.004, "int8-row": 0.04, "int8-nbits": 0.02, "int8-dynamic": 0.08, "int8-static": 0.08,
}  # fmt: skip
"""The largest ‖Δ‖/‖torch‖ that one layer may add. Layers round independently: it grows with the root of their number.

Half precision: a step is 2⁻¹¹, and a layer takes some eight. 8 bits: a step is 1/127 of the largest input, and an error
1/√12 of a step. Where the largest is c times their root mean square, that is c / (127 √12): 4 % for rows with outliers
(c = 18), twice that with one scale for all rows, be it from them or from texts before; in blocks of 32, of rows and
weights alike, c is at most √32: 2 %.
"""
ON_CPU: tuple[Precision, ...] = ("int8-row", "int8-dynamic")
"""Precisions whose kernels are those of CPUs."""
Neighbours = Literal["nothing", "rounding", "anything"]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
OPSETS = (18, 23)
PORTABLE = 20
"""The operator set that is the default: it has GELU, and most runtimes have it."""
MODEL = {"hf": "onnx/model.onnx", "flat": "model.onnx", "triton": "1/model.onnx", "web": "onnx/model.onnx"}
"""Where the file lies in a directory, by layout."""
OPENVINO, IR = ("fp32", "int8-static"), "openvino_model.xml"
"""Precisions of OpenVINO's files, and where others look for one; a ``.bin`` lies beside."""


def allowed_drift(precision: Precision, layers: int) -> float:
    """The largest ‖Δ‖/‖torch‖ that an encoder of so many layers passes with; 0 in fp32, where outputs are bounded."""
    return DRIFT.get(precision, 0.0) * math.sqrt(layers)


@dataclass(frozen=True)
class ExportSpec:
    """``atol`` bounds |Δ| of every output between ONNX Runtime and torch, ``None``: by what float32 rounds
    (``verify.Bars``); ``opset`` is the ONNX operator set.

    ``unpad`` of ``None`` means: for the target ``cpu``, where the direct back end writes the file.
    """

    merge: bool = option(False, "Fold LoRA, BitFit and head into the weights.")
    bake: bool = option(False, "With --merge: adapters, prompts and prefixes become nodes of the graph.")
    atol: float | None = option(
        None,
        "In fp32: largest difference from torch that is accepted. "
        "Default: what float32 rounds in so many layers, 2e-6 of the largest output in each.",
    )
    opset: int | None = option(None, f"ONNX operator set, 18 to 23. Default: {PORTABLE}.")
    target: Literal["cpu", "cuda", "portable", "openvino"] = option(
        "cpu",
        "What it is to run on: cuda has ONNX Runtime's fused attention; portable is plain ONNX; openvino "
        "is OpenVINO's own format.",
    )
    unpad: bool | None = option(None, "Leave padding out of the work. Default: for the target cpu.")
    back_end: Literal["auto", "direct", "torch"] = option(
        "auto", "Written from the weights, or by torch's exporter; auto: direct if it can."
    )
    precision: Precision = option(
        "fp32",
        "fp16, or the encoder's products in 8 bits: int8-row with a scale for each row, int8-nbits for "
        "each 32 inputs, int8-dynamic for the whole batch, so that answers depend on it. For openvino fp32, or "
        "int8-static with scales that are taken from texts beforehand (--calibrate).",
    )
    max_drift: float | None = option(
        None,
        "Below fp32: largest ‖Δ‖/‖torch‖ of all outputs that is accepted. "
        f"Default: {', '.join(f'{name} {value:g}' for name, value in DRIFT.items())} times the root of the layers.",
    )
    layout: Literal["hf", "flat", "triton", "web"] = option(
        "hf",
        "onnx/model.onnx as HuggingFace's tools look for it; flat; a model of NVIDIA Triton's; with --multi web: a "
        "file for each delta, which a browser fetches when it is asked.",
    )
    overwrite: bool = option(False, "Replace an earlier export.")

    def __post_init__(self) -> None:
        if not OPSETS[0] <= self.operators <= OPSETS[1]:
            raise SpecError(f"opset is {self.opset}; expected {OPSETS[0]} to {OPSETS[1]}")
        if self.atol is not None and not self.atol > 0:
            raise SpecError(f"atol is {self.atol}; expected a number above 0, such as 1e-5")
        if self.max_drift is not None and not self.max_drift > 0:
            raise SpecError(f"max_drift is {self.max_drift}; expected a number above 0, such as 0.1")
        if self.back_end == "torch" and (self.unpad or self.precision != "fp32"):
            raise SpecError("torch's exporter neither unpads nor quantises; take the direct back end for it")
        wrong = self.precision not in OPENVINO if self.target == "openvino" else self.precision == "int8-static"
        if wrong:
            raise SpecError(
                f"precision {self.precision} is not for the target {self.target}; openvino takes "
                f"{' and '.join(OPENVINO)}, and int8-static is for openvino alone"
            )
        if self.target == "openvino" and (self.unpad or self.layout == "triton"):
            raise SpecError("--target openvino is padded, beside its config.json; leave out --unpad and --layout")
        if self.target == "cuda" and self.precision in ON_CPU:
            raise SpecError(
                f"precision {self.precision} is for CPUs; for the target cuda take fp16, fp32 or int8-nbits"
            )

    @property
    def operators(self) -> int:
        """The ONNX operator set of a file that the direct back end writes."""
        return PORTABLE if self.opset is None else self.opset

    def drift(self, layers: int) -> float:
        """The largest ‖Δ‖/‖torch‖ that passes although single outputs are further off than ``atol``; 0 in float32."""
        asked = None if self.precision == "fp32" else self.max_drift
        return allowed_drift(self.precision, layers) if asked is None else asked

    @property
    def neighbours(self) -> Neighbours:
        """What a row's neighbours in the batch may change in it.

        float32's last bit depends on a batch's shape. Where it tips a value over to the next of few steps, in half
        precision or in 8 bits, all that follows may be rounded otherwise too.
        """
        if self.precision == "int8-dynamic":
            return "anything"
        return "nothing" if self.precision == "fp32" else "rounding"

    @property
    def provider(self) -> str:
        """The provider of ONNX Runtime that the file is verified on, where it can be used."""
        return CUDA if self.target == "cuda" else CPU

    @property
    def model(self) -> str:
        return IR if self.target == "openvino" else MODEL[self.layout]

    @property
    def unpads(self) -> bool:
        """Whether padding is left out, where the direct back end writes the file."""
        return self.target == "cpu" if self.unpad is None else self.unpad
