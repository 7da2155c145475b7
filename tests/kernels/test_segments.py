"""The torch references against float64, written out row by row."""

from __future__ import annotations

import pytest
import torch

from bertology_serve.kernels.segments import ACTIVATIONS, RowSegment, add_low_rank, bottleneck, grouped

T, K, N, P = 23, 17, 13, 40
SEGMENTS = [
    RowSegment(0, 5, 1, 4),
    RowSegment(5, 6, 4, 20, bias=20),
    RowSegment(9, 16, 0, 0, bias=30),
    RowSegment(16, 23, 21, 22, bias=22),
]


def double(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One row and one rank at a time."""
    out = y.clone()
    for segment in SEGMENTS:
        for row in range(segment.lo, segment.hi):
            for rank in range(segment.first, segment.last):
                out[row] += (x[row] @ a[rank]) * b[rank]
            if segment.bias >= 0:
                out[row] += b[segment.bias]
    return out


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.double() - want).norm() / want.norm())


def test_low_rank_rows_and_biases_equal_the_sum_in_float64() -> None:
    y, x, a, b = double(T, N, seed=1), double(T, K, seed=2), double(P, K, seed=3), double(P, N, seed=4)
    want = expected(y, x, a, b)
    with torch.inference_mode():
        got = add_low_rank(y.float(), x.float(), a.float(), b.float(), SEGMENTS)
    assert error(got, want) < 1e-6
    assert torch.equal(got[6:9], y.float()[6:9])  # rows of no segment are untouched
    recorded = add_low_rank(y.float(), x.float(), a.float().requires_grad_(), b.float(), SEGMENTS)
    assert error(recorded.detach(), want) < 1e-6


@pytest.mark.parametrize(("most", "groups"), [(0, 4), (2_000, 3), (10**9, 1)])
def test_groups_of_segments_equal_the_sum_in_float64(most: int, groups: int) -> None:
    y, x, a, b = double(T, N, seed=1), double(T, K, seed=2), double(P, K, seed=3), double(P, N, seed=4)
    made = grouped(SEGMENTS, K + N, most, torch.float64)
    assert len(made) == groups
    got, biases = y.clone(), y.clone()
    for group in made:
        group.add(got, x, a, b)
        group.add(biases, None, None, b)
    assert error(got, expected(y, x, a, b)) < 1e-14
    assert torch.equal(got[6:9], y[6:9])
    assert error(biases, expected(y, x * 0, a, b)) < 1e-14


def test_what_overflows_stays_with_the_rows_that_own_it() -> None:
    y, x, a, b = double(T, N, seed=1), double(T, K, seed=2), double(P, K, seed=3), double(P, N, seed=4)
    a[21:22] = 1e308  # the last segment's: its products are infinite
    (group,) = grouped(SEGMENTS, K + N, 10**9, torch.float64)
    got = y.clone()
    group.add(got, x * 100, a, b)
    assert got[16:].isinf().any() or got[16:].isnan().any()
    assert error(got[:16], expected(y, x * 100, a, b)[:16]) < 1e-14


def test_gradients_are_those_of_the_sum() -> None:
    x, a, b = (double(*s, seed=i).requires_grad_() for i, s in enumerate([(T, K), (P, K), (P, N)]))
    y = double(T, N, seed=9)
    loss = (add_low_rank(y, x, a, b, SEGMENTS) ** 2).sum()
    want = torch.autograd.grad((expected(y, x, a, b) ** 2).sum(), [x, a, b])
    for got, reference in zip(torch.autograd.grad(loss, [x, a, b]), want, strict=True):
        torch.testing.assert_close(got, reference)


def test_bottleneck_equals_its_formula() -> None:
    down, down_bias, up, h = double(P, K, seed=1), double(P, 1, seed=2), double(P, K, seed=3), double(T, K, seed=4)
    for name in ACTIVATIONS:
        segment = RowSegment(0, T, 3, 11, bias=11, activation=name)
        got = bottleneck(h.float(), down.float(), down_bias.float(), up.float(), segment)
        want = ACTIVATIONS[name](h @ down[3:11].T + down_bias[3:11, 0]) @ up[3:11] + up[11]
        assert error(got, want) < 1e-6
