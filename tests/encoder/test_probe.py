from __future__ import annotations

import math

import pytest
import torch

from bertology_serve.encoder import loading
from bertology_serve.encoder.loading import rounding


@pytest.mark.parametrize("off", [float("nan"), float("inf"), 1e-3])
def test_rows_that_differ_or_are_no_numbers_are_not_near(off):
    own = torch.ones(2, 3)
    assert loading._apart(own + 1e-6, own) <= loading._TOLERANCE
    for rows, others in ((own + off, own), (own, own + off)):
        assert not loading._apart(rows, others) <= loading._TOLERANCE


def test_rounding_grows_with_depth_and_size():
    assert rounding(6, 1.0) == pytest.approx(1.5e-5, rel=0.02)
    assert rounding(22, 1.0) == pytest.approx(3 * rounding(6, 1.0))
    assert rounding(6, 10.0) == pytest.approx(10 * rounding(6, 1.0))
    assert rounding(6, 0.1) == rounding(6, 1.0)
    assert math.isnan(rounding(6, float("inf")))
    assert math.isnan(rounding(6, float("nan")))
