"""The bank: extents never overlap, freed rows are used again, rows hold what was put in."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertology_serve.encoder.bank import RowPool

CPU = torch.device("cpu")


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 10**6)), max_size=40))
def test_extents_hold_their_rows_and_row_zero_stays_zero(steps: list[tuple[bool, int, int]]) -> None:
    pool = RowPool({"a": (2, 3), "b": (2, 5)}, torch.float32, CPU)
    held: dict[int, tuple[int, torch.Tensor]] = {}
    for put, count, seed in steps:
        if put or not held:
            rows = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(seed))
            held[pool.put({"a": rows})] = (count, rows)
        else:
            first = sorted(held)[seed % len(held)]
            pool.drop(first, held.pop(first)[0])
    for first, (count, rows) in held.items():
        assert torch.equal(pool.columns["a"][:, first : first + count], rows)
    taken = sum(count for count, _ in held.values())
    assert torch.equal(pool.columns["a"][:, 0], torch.zeros(2, 3))
    assert sum(hi - lo for lo, hi in pool.free) == pool.capacity - taken - 1
    assert float(pool.columns["a"].abs().sum()) == float(sum(rows.abs().sum() for _, rows in held.values())) or held


def test_loading_and_unloading_a_thousand_times_takes_no_more_memory() -> None:
    pool = RowPool({"a": (2, 3)}, torch.float32, CPU)
    for count in range(1, 1001):
        pool.drop(pool.put({"a": torch.ones(2, count % 7 + 1, 3)}), count % 7 + 1)
    assert pool.capacity == 16
    assert pool.free == [(1, 16)]
