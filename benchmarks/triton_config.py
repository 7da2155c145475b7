"""Reads the config.pbtxt of an export with NVIDIA's own definition of it, and compares it with the model's interface.

    ENVIRONMENT/bin/python benchmarks/triton_config.py DIR...

The environment has tritonclient (for ``model_config.proto``), protobuf and onnx. Exits with 1 where one does not fit.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import onnx
from google.protobuf import text_format

TYPES = {onnx.TensorProto.INT64: "TYPE_INT64", onnx.TensorProto.FLOAT: "TYPE_FP32"}


def definition() -> Any:
    """Triton's generated module, without the gRPC that its package imports."""
    package = importlib.util.find_spec("tritonclient")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interface(values: Any) -> list[tuple[str, str, list[int]]]:
    """Name, type and dims without the batch of a graph's inputs or outputs; -1 where a length is free."""
    found = []
    for value in values:
        tensor = value.type.tensor_type
        dims = [dim.dim_value or -1 for dim in tensor.shape.dim][1:]
        found.append((value.name, TYPES[tensor.elem_type], dims))
    return found


def main(directories: list[Path]) -> int:
    """One line a directory."""
    module, wrong = definition(), 0
    for directory in directories:
        config = text_format.Parse((directory / "config.pbtxt").read_text(), module.ModelConfig())
        graph = onnx.load(directory / "1" / "model.onnx", load_external_data=False).graph
        names = module.DataType.Name
        told = [
            [(one.name, names(one.data_type), list(one.dims)) for one in side] for side in (config.input, config.output)
        ]
        fits = told == [interface(graph.input), interface(graph.output)] and config.backend == "onnxruntime"
        wrong += not fits
        print(f"{directory}: {'fits' if fits else 'DOES NOT FIT'}: {told}, max_batch_size {config.max_batch_size}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]]))
