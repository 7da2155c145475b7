"""Cuts of a batch by length against all cuts there are."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from bertology_serve.export.onnx_engine import buckets


def cost(groups, lengths, price):
    return sum(len(group) * max(lengths[i] for i in group) ** 2 + price for group in groups)


def cheapest(lengths, price):
    """The cost of the best cut of the sorted lengths, all tried."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    found = []
    for count in range(len(order)):
        for cuts in combinations(range(1, len(order)), count):
            edges = [0, *cuts, len(order)]
            groups = [order[a:b] for a, b in pairwise(edges)]
            found.append(cost(groups, lengths, price))
    return min(found)


@pytest.mark.parametrize("seed", range(8))
def test_no_cut_is_cheaper(seed):
    draw = np.random.default_rng(seed)
    lengths, price = draw.integers(1, 40, 9).tolist(), int(draw.integers(1, 800))
    groups = buckets(lengths, 1, price)
    assert sorted(i for group in groups for i in group) == list(range(9))
    assert all(group == sorted(group) for group in groups)
    assert cost(groups, lengths, price) == cheapest(lengths, price)


def test_like_lengths_and_few_sequences_stay_together():
    assert buckets([24] * 64, 384) == [list(range(64))]
    assert buckets([3, 100], 384) == [[0, 1]]
    assert buckets([10, 128] * 32, 384) == [list(range(0, 64, 2)), list(range(1, 64, 2))]
