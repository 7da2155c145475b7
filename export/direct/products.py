"""Products of rows and frozen weights: in float32, or in 8 bits with a scale for every row and every column.

Quantised row by row, a row's answer does not depend on what else is in the batch; ONNX Runtime's own dynamic
quantisation takes one scale for all rows, and there it does.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bertology_serve.export.direct.nodes import Nodes, Value

ZERO, MOST, SMALLEST = 128, 127, 1e-12


def product(x: Value, name: str, weight: Tensor) -> Value:
    """``x W``: x [T, K]; ``weight`` [N, K] stands in the file as [K, N]."""
    return x @ x.nodes.weight(name, weight.T)


def quantised_product(x: Value, name: str, weight: Tensor) -> Value:
    """``(q W) s c`` with q = round(x / s): s [T, 1] and c [1, N] bring the largest of each row and column to 127.

    q is stored with 128 added, for kernels multiply uint8 with int8. The weight keeps its name; c is ``NAME_scale``.
    """
    nodes = x.nodes
    integers, scales = quantised(weight)
    w, c = nodes.array(name, integers.T.contiguous().numpy()), nodes.array(f"{name}_scale", scales.numpy())
    q, s = quantised_rows(x)
    sums = nodes("MatMulInteger", q, w, nodes.constant(np.array(ZERO, dtype=np.uint8)))
    return nodes("DequantizeLinear", sums, s, axis=0) * c


def quantised_rows(x: Value) -> tuple[Value, Value]:
    """q [T, K], uint8, and s [T]; made once for all products of the same rows."""
    nodes: Nodes = x.nodes
    largest = nodes("Abs", x).reduce("Max", 1)
    s = nodes("Max", largest, SMALLEST) * (1 / MOST)
    zeros = nodes("Expand", nodes.constant(np.array(ZERO, dtype=np.uint8)), s.size(0))
    return nodes("QuantizeLinear", x, s, zeros, axis=0), s


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] as int8 [N, K] and float32 scales [N], by which the integers are multiplied."""
    scales = weight.abs().amax(1).clamp(min=SMALLEST) / MOST
    return torch.round(weight / scales[:, None]).to(torch.int8), scales
