"""Sequences of like length together: the graph computes attention in a grid as wide as the longest of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FIXED = 60
"""What a run of the graph costs besides its rows, for each unit of the encoder's width, in places of the grid [R, R].

A run reads all weights once and starts some hundred nodes.
"""


def buckets(lengths: Sequence[int], hidden: int, fixed: int = FIXED) -> list[list[int]]:
    """Indices of sequences, those of a bucket in their order, so cut that ``Σ (count · longest² + fixed · hidden)`` is
    smallest (by dynamic programming over the distinct lengths)."""
    sizes, counts = np.unique(np.asarray(lengths), return_counts=True)
    if counts.sum() * int(sizes[-1]) ** 2 - (counts * sizes**2).sum() <= fixed * hidden:
        return [list(range(len(lengths)))]
    edges = _edges(sizes, np.concatenate([[0], np.cumsum(counts)]), fixed * hidden)
    number = np.searchsorted(edges, np.asarray(lengths))
    return [np.flatnonzero(number == bucket).tolist() for bucket in range(len(edges))]


def _edges(sizes: np.ndarray, before: np.ndarray, price: int) -> list[int]:
    """The longest length of each bucket, rising; ``before[i]`` sequences are shorter than ``sizes[i]``."""
    best, cut = np.zeros(len(sizes) + 1), np.zeros(len(sizes) + 1, int)
    for end in range(1, len(sizes) + 1):
        costs = best[:end] + (before[end] - before[:end]) * float(sizes[end - 1]) ** 2 + price
        cut[end] = int(costs.argmin())
        best[end] = costs[cut[end]]
    edges, end = [], len(sizes)
    while end:
        edges.append(int(sizes[end - 1]))
        end = cut[end]
    return edges[::-1]
