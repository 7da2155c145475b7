"""Activations as nodes, by HuggingFace's names."""

from __future__ import annotations

import math
from collections.abc import Callable

from bertology_serve.export.direct.nodes import Value

GELU_SINCE = 20
"""The opset from which ONNX has GELU."""


def _gelu(x: Value) -> Value:
    """``x Φ(x)`` (Hendrycks & Gimpel, 2016)."""
    if x.nodes.opset >= GELU_SINCE:
        return x.nodes("Gelu", x)
    return x * (x.nodes("Erf", x * math.sqrt(0.5)) + 1.0) * 0.5


def _gelu_tanh(x: Value) -> Value:
    """``x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))``, that paper's approximation."""
    cube = x * x * x
    return x * (x.nodes("Tanh", (x + cube * 0.044715) * math.sqrt(2 / math.pi)) + 1.0) * 0.5


ACTIVATIONS: dict[str | None, Callable[[Value], Value]] = {
    None: lambda x: x,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda x: x.nodes("Relu", x),
    "silu": lambda x: x * x.nodes("Sigmoid", x),
    "tanh": lambda x: x.nodes("Tanh", x),
}
