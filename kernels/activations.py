"""Activations inside kernels, by the names that ``segments.ACTIVATIONS`` has."""

from __future__ import annotations

import triton.language as tl

from bertology_serve.kernels.launching import Block, jit


@jit
def activate(v: Block, ACTIVATION: tl.constexpr) -> Block:
    """act(v) for fp32 v of any shape; "" is the identity, "gelu" the exact one (Hendrycks & Gimpel, 2016)."""
    if ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "relu":
        v = tl.maximum(v, 0.0)
    elif ACTIVATION == "silu":
        v = v * tl.sigmoid(v)
    elif ACTIVATION == "tanh":
        v = 2.0 * tl.sigmoid(2.0 * v) - 1.0
    else:
        tl.static_assert(ACTIVATION == "", "an activation that kernels do not have")
    return v
