"""What a pipeline runs on, settled once: the layout of its weights, CUDA graphs, its engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import Unsupported
from bertology_serve.export.spec import MultiPrecision
from bertology_serve.serving.engines import Name, settle


@dataclass(frozen=True)
class Setting:
    """What was asked for, or with ``found`` what was settled before on this machine and is not timed again.

    ``prepack`` lays weights out for oneDNN; ``None``: a short timing decides.
    """

    engine: Name = "auto"
    precision: MultiPrecision = "fp32"
    cuda_graphs: bool = False
    prepack: bool | None = None
    found: bool = False


def apply(pipeline: Pipeline, setting: Setting) -> tuple[str, Setting]:
    """Makes a pipeline so; the engine's name, and what was found. Its deltas are what the engines are compared with.

    Raises Unsupported, VerificationError for what cannot be.
    """
    encoder = pipeline.encoder
    prepacked = encoder.prepack(setting.prepack)
    if setting.cuda_graphs and not encoder.use_graphs():
        where = f"{str(encoder.dtype).removeprefix('torch.')} on {encoder.device}"
        raise Unsupported(f"--cuda-graphs: got {where}, expected float16 or bfloat16 on cuda")
    name = settle(pipeline, setting.engine, setting.precision, setting.found)
    engine: Name = "torch" if pipeline.engine is encoder else "onnx"
    if engine == "onnx":
        encoder.unpack_weights()  # ONNX Runtime has laid them out for itself
    return name, replace(
        setting, engine=engine, prepack=prepacked if encoder.device.type == "cpu" else None, found=True
    )
