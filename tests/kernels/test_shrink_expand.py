"""Shrink, expand and the two-launch form against float64: interpreted always, compiled where there is a GPU."""

from __future__ import annotations

import pytest

from bertology_serve.kernels.shrink_expand import k_splits
from tests.kernels import checks_shrink_expand
from tests.kernels.deltas import ON_GPU
from tests.kernels.interpreting import checks, interpreted

CHECKS = checks(checks_shrink_expand)


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name):
    problem = interpreted(checks_shrink_expand.__name__)[name]
    assert not problem, problem


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ON_GPU, ids=lambda s: str(s.dtype))
@pytest.mark.parametrize("name", CHECKS)
def test_on_gpu(name, setting):
    CHECKS[name](setting)


def test_k_is_cut_where_tiles_do_not_fill_a_gpu():
    """Equal parts of whole steps, two steps each at least; the choice is one of the launch's shape alone."""
    assert k_splits(32, 768, 64) == 4
    assert k_splits(8, 3072, 64) == 16
    assert k_splits(1, 768, 64) == 6
    assert k_splits(200, 768, 64) == 1
    assert k_splits(8, 37, 32) == k_splits(8, 64, 64) == 1
