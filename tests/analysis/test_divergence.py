"""Clusters against scipy's average linkage, and the flat map of points that lie in a plane."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import cdist, squareform

from bertology_serve.analysis.head_statistics import clusters, flat_map


def distances(count: int, width: int, seed: int) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(count, width))
    return cdist(points, points)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_clusters_are_scipys(count: int) -> None:
    apart = distances(20, 4, 0)
    found = clusters(apart, count)
    expected = fcluster(linkage(squareform(apart, checks=False), "average"), count, "maxclust")
    together = {(i, j) for i in range(20) for j in range(20) if found[i] == found[j]}
    assert together == {(i, j) for i in range(20) for j in range(20) if expected[i] == expected[j]}
    sizes = [found.count(number) for number in range(count)]
    assert sizes == sorted(sizes, reverse=True)


def test_flat_map_keeps_the_distances_of_a_plane() -> None:
    apart = distances(9, 2, 1)
    points = flat_map(apart)
    assert cdist(points, points) == pytest.approx(apart, abs=1e-9)
