from __future__ import annotations

import numpy as np
import onnx_ir
import onnxruntime
import torch

from bertology_serve.export.emitter.nodes import Nodes, Output, Value, counted, joined


def run(build, x: np.ndarray) -> np.ndarray:
    """What a formula makes of the int64 input x [B, L]."""
    nodes = Nodes(20)
    given = nodes.input("x")
    model = nodes.model([given], Output("y", build(nodes, given).real(), ("batch", "sequence")))
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    return session.run(None, {"x": x})[0]


X = np.array([[1, 5, 2], [7, 0, 4]])


def test_formulas_read_as_those_of_arrays():
    formulas = {
        "sum": (lambda n, x: x + 2 - x % 3, X + 2 - X % 3),
        "logic": (lambda n, x: ((x < 4) & ~(x <= 1)) | (x < 1), ((X < 4) & ~(X <= 1)) | (X < 1)),
        "where": (lambda n, x: (x < 3).where(x, 9), np.where(X < 3, X, 9)),
        "gather": (lambda n, x: x.gather([2, 0], 1), X[:, [2, 0]]),
        "shape": (lambda n, x: x.transpose(1, 0).reshape(x.size(0), -1), X.T.reshape(2, -1)),
        "join": (lambda n, x: joined(1, *reversed(x.reshape(3, 2).split(2, 1))), X.reshape(3, 2)[:, ::-1]),
        "count": (lambda n, x: counted(n, x.size(1)).clip(1, 5), np.arange(3).clip(1, 5)),
        "reduce": (lambda n, x: x.reduce("Max", 1, keep=True).squeeze(1).unsqueeze(0), X.max(1)[None]),
        "real": (lambda n, x: x.real() / 4.0 * 0.5 @ n.constant(np.eye(3, dtype=np.float32)), X / 8),
        "total": (lambda n, x: n.total(x.real(), x.real() * 2.0, x.real()), X * 4),
    }
    for name, (formula, expected) in formulas.items():
        assert np.array_equal(run(formula, X), expected.astype(np.float32)), name


def test_equal_nodes_and_constants_are_made_once_but_weights_are_not():
    nodes = Nodes(20)
    x = nodes.input("x")
    assert (x + 1) is (x + 1)
    assert (x + 1) is not (x + 2)
    assert nodes("ReduceMax", x, [1], keepdims=1) is not nodes("ReduceMax", x, [1], keepdims=0)
    same = torch.ones(2)
    a, b = nodes.weight("a", same), nodes.weight("b", same)
    assert (a.ir.name, b.ir.name) == ("a", "b")
    assert nodes.weight("a", same).ir is a.ir
    assert nodes.total(a) is a


def test_the_same_calls_give_the_same_bytes():
    def made() -> bytes:
        nodes = Nodes(23)
        x: Value = nodes.input("x")
        weight = nodes.weight("w", torch.arange(6.0).view(2, 3).T)
        return onnx_ir.to_proto(nodes.model([x], Output("y", x.real() @ weight, ("batch", 2)))).SerializeToString()

    assert made() == made()
