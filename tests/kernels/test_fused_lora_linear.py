"""The fused kernel against float64: interpreted always, compiled where there is a GPU."""

from __future__ import annotations

import pytest

from tests.kernels import checks_fused
from tests.kernels.deltas import ON_GPU
from tests.kernels.interpreting import checks, interpreted

CHECKS = checks(checks_fused)


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name):
    problem = interpreted(checks_fused.__name__)[name]
    assert not problem, problem


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ON_GPU, ids=lambda s: str(s.dtype))
@pytest.mark.parametrize("name", CHECKS)
def test_on_gpu(name, setting):
    CHECKS[name](setting)
