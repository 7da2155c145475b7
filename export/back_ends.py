"""Which back end writes a file, and the file's graph."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir

from bertology_serve.errors import Unsupported
from bertology_serve.export.emitter.emit import emit, obstacle
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import PORTABLE, ExportSpec


@dataclass(frozen=True)
class Chosen:
    """``direct`` or torch's exporter, whether padding is left out of the work, and the ONNX operator set."""

    direct: bool
    unpad: bool
    opset: int

    @property
    def name(self) -> str:
        """As ``--back-end`` has it."""
        return "direct" if self.direct else "torch"


def choose(parts: ExportInputs, spec: ExportSpec) -> Chosen:
    """The direct back end where it can; raises Unsupported where it was asked for by name and cannot."""
    stands_in_the_way = obstacle(parts) if spec.back_end != "torch" else "another was asked for"
    if stands_in_the_way is None:
        return Chosen(True, spec.unpads, spec.operators)
    if spec.back_end == "direct" or spec.unpad or spec.precision != "fp32":
        raise Unsupported(
            f"the direct back end cannot write this model: {stands_in_the_way}; leave out --back-end, --unpad and "
            "--precision: torch's exporter then writes it, padded and in float32"
        )
    return Chosen(False, False, PORTABLE if spec.opset is None else spec.opset)


def write(parts: ExportInputs, chosen: Chosen, spec: ExportSpec) -> onnx_ir.Model:
    """The ONNX model; raises what ``to_onnx`` raises."""
    if chosen.direct:
        return emit(parts, chosen.opset, chosen.unpad, spec.precision, fused=spec.target == "cuda")
    from bertology_serve.export.torch_exporter import (
        Graph,  # the exporter is half a second of imports
        to_onnx,
    )

    return to_onnx(Graph(parts), chosen.opset)
