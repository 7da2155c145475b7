from __future__ import annotations

import numpy as np
import onnx_ir
import onnxruntime

from bertology_serve.export.layout import annotate, save


def linear_model() -> onnx_ir.Model:
    """``y = x w`` with w [4, 300]."""
    x = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["batch", 4])
    w = onnx_ir.val("w", const_value=onnx_ir.tensor(np.arange(1200, dtype=np.float32).reshape(4, 300), name="w"))
    node = onnx_ir.node("MatMul", [x, w])
    node.outputs[0].name = "y"
    node.outputs[0].dtype = onnx_ir.DataType.FLOAT
    graph = onnx_ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 20})
    return onnx_ir.Model(graph, ir_version=10)


def run(path):
    return onnxruntime.InferenceSession(str(path)).run(None, {"x": np.ones((1, 4), dtype=np.float32)})[0]


def test_large_weights_get_a_file_of_their_own(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    model = linear_model()
    annotate(model, {"b": "2", "a": "1"})
    small = save(model, tmp_path / "a" / "model.onnx")
    large = save(model, tmp_path / "b" / "model.onnx", external_over=1000)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model.onnx"]
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"model.onnx", "model.onnx_data"}
    assert small == (tmp_path / "a" / "model.onnx").stat().st_size
    assert large == sum(path.stat().st_size for path in (tmp_path / "b").iterdir())
    assert np.array_equal(run(tmp_path / "a" / "model.onnx"), run(tmp_path / "b" / "model.onnx"))
    assert list(onnx_ir.load(tmp_path / "b" / "model.onnx").metadata_props.items()) == [("a", "1"), ("b", "2")]
