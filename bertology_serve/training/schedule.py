"""The learning rate as a function of the step."""

from __future__ import annotations

import math


def factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """The share of the highest learning rate that step ``step`` (from 0) of ``total`` uses.

    It rises linearly over the first ``warmup * total`` steps, then falls to 0 at ``total`` (``linear``, or half a
    ``cosine``) or stays (``constant``). The first step already learns.
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, total - rising)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
