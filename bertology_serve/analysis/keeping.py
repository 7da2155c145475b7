"""Which heads and neurons stay when a share of them goes: the least important go first, and no layer loses all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def kept(values: Sequence[Tensor], share: float, multiple: int = 1) -> tuple[tuple[int, ...], ...]:
    """Numbers that stay in each layer, rising, when ``share`` of all goes, those of the lowest value first.

    values: [n] a layer, compared across layers as they are. The most important of a layer always stays; with
    ``multiple`` as many more as make the layer's number a multiple of it, as far as the layer has them.
    """
    order = sorted((value, layer) for layer, own in enumerate(values) for value in own.tolist())
    left = [len(own) for own in values]
    going = round(share * sum(left))
    for _, layer in order:
        if going and left[layer] > 1:
            left[layer] -= 1
            going -= 1
    counts = [min(len(own), -(-count // multiple) * multiple) for own, count in zip(values, left, strict=True)]
    return tuple(
        tuple(sorted(own.argsort(descending=True, stable=True)[:count].tolist()))
        for own, count in zip(values, counts, strict=True)
    )
