"""Products of rows and frozen weights: in float32 or float16, or in 8 bits in one of three ways.

``int8-row`` quantises rows one by one and ``int8-nbits`` blocks of each row: an answer does not depend on what else is
in the batch. ``int8-dynamic``, ONNX Runtime's own way, takes one scale for all rows, and there it does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.export.emitter.nodes import CONTRIB, Nodes, Value
from bertology_serve.export.export_spec import Precision

ZERO, MOST, SMALLEST = 128, 127, 1e-12
BLOCK = 32
"""Inputs that share one scale in ``int8-nbits``."""
IN_8_BITS = 4
"""MatMulNBits' accuracy level at which rows are multiplied in 8 bits, with one scale a block of a row."""


def product(x: Value, name: str, weight: Tensor) -> Value:
    """``x W``: x [T, K]; ``weight`` [N, K] stands in the file as [K, N]."""
    return x @ x.nodes.weight(name, weight.T)


def quantised_product(x: Value, name: str, weight: Tensor) -> Value:
    """``(q W) s c`` with q = round(x / s): s [T, 1] and c [1, N] bring the largest of each row and column to 127.

    q is stored with 128 added, for kernels multiply uint8 with int8. The weight keeps its name; c is ``NAME_scale``.
    """
    nodes, (w, c) = x.nodes, _columns(x.nodes, name, weight)
    q, s = quantised_rows(x)
    sums = nodes("MatMulInteger", q, w, nodes.constant(np.array(ZERO, dtype=np.uint8)))
    return nodes("DequantizeLinear", sums, s, axis=0) * c


def quantised_rows(x: Value) -> tuple[Value, Value]:
    """q [T, K], uint8, and s [T]; made once for all products of the same rows."""
    nodes: Nodes = x.nodes
    s = nodes("Max", nodes("Abs", x).reduce("Max", 1), SMALLEST) * (1 / MOST)
    zeros = nodes("Expand", nodes.constant(np.array(ZERO, dtype=np.uint8)), s.size(0))
    return nodes("QuantizeLinear", x, s, zeros, axis=0), s


def dynamic_product(x: Value, name: str, weight: Tensor) -> Value:
    """``(q W) (s c)`` with one s for all of x: the nodes that ONNX Runtime's ``quantize_dynamic`` makes, and fuses."""
    nodes, (w, c) = x.nodes, _columns(x.nodes, name, weight)
    q, s, zero = nodes.several("DynamicQuantizeLinear", 3, x)
    return nodes("MatMulInteger", q, w, zero).real() * (s * c)


def blocked_product(x: Value, name: str, weight: Tensor) -> Value:
    """``x W`` with a scale for every block of a column, ``NAME_scale``; the weight is uint8 [N, blocks, block].

    ONNX Runtime's ``MatMulNBits``, which quantises rows in the same blocks as it multiplies.
    """
    nodes, (outputs, inputs) = x.nodes, weight.shape
    integers, scales = blocks(weight)
    w, c = nodes.array(name, integers.numpy()), nodes.weight(f"{name}_scale", scales)
    sizes = {"K": inputs, "N": outputs, "bits": 8, "block_size": BLOCK}
    return nodes("MatMulNBits", x, w, c, domain=CONTRIB, accuracy_level=IN_8_BITS, **sizes)


PRODUCTS: dict[Precision, Callable[[Value, str, Tensor], Value]] = {
    "fp32": product,
    "fp16": product,
    "int8-row": quantised_product,
    "int8-nbits": blocked_product,
    "int8-dynamic": dynamic_product,
}


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] as int8 [N, K] and float32 scales [N], by which the integers are multiplied."""
    scales = weight.abs().amax(1).clamp(min=SMALLEST) / MOST
    return torch.round(weight / scales[:, None]).to(torch.int8), scales


def blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] as uint8 [N, blocks, BLOCK], 128 added and zeros behind the last input, and float32 scales [N, blocks]."""
    outputs, inputs = weight.shape
    parts = F.pad(weight, (0, -inputs % BLOCK)).reshape(-1, BLOCK)
    integers, scales = quantised(parts)
    stored = (integers.to(torch.int16) + ZERO).to(torch.uint8)
    return stored.reshape(outputs, -1, BLOCK), scales.reshape(outputs, -1)


def _columns(nodes: Nodes, name: str, weight: Tensor) -> tuple[Value, Value]:
    """The weight [K, N], int8, and ``NAME_scale`` [N]."""
    integers, scales = quantised(weight)
    return nodes.array(name, integers.T.contiguous().numpy()), nodes.array(f"{name}_scale", scales.numpy())
