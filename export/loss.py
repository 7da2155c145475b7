"""How much of a delta a cast of the merged weights to half precision would lose."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def lost(base: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> dict[str, float] | None:
    """``‖(cast(W + Δ) - cast(W)) - Δ‖ / ‖Δ‖`` over all weights that a delta changed, by the type cast to.

    ``base`` holds W and ``merged`` W + Δ, by the same names; what ``base`` lacks is zero there. Near zero, the cast
    model still has the delta; at 1, it might as well be the base. ``None`` where nothing changed.
    """
    gone, whole = dict.fromkeys(HALVES, 0.0), 0.0
    for name, after in merged.items():
        before = base.get(name)
        if not after.is_floating_point() or (before is not None and before.data_ptr() == after.data_ptr()):
            continue
        before = torch.zeros_like(after) if before is None else before.detach().to("cpu", torch.float32)
        delta = after.double() - before.double()
        whole += float(delta.square().sum())
        for kind, half in HALVES.items():
            kept = after.to(half).double() - before.to(half).double()
            gone[kind] += float((kept - delta).square().sum())
    return {kind: (part / whole) ** 0.5 for kind, part in gone.items()} if whole else None
