"""The column lists against a brute-force reading of the segments."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bertology_serve.kernels import reference
from bertology_serve.kernels.columns import active, aligned, tile_columns
from bertology_serve.kernels.segments import RowSegment, add_low_rank
from tests.kernels.deltas import Request, case, error, segments

REQUESTS = [Request(5, 4), Request(1, 20, True), Request(3), Request(16, 0, True), Request(0, 7), Request(200, 1)]


def expected(part: list[RowSegment], rows: int, block_m: int) -> list[set[tuple[int, int, int, bool]]]:
    """For each tile, its columns as ``active`` gives them."""
    found = []
    for at in range(0, rows, block_m):
        tile = set()
        for s in part:
            lo, hi = max(s.lo, at), min(s.hi, at + block_m)
            if lo < hi:
                tile |= {(row, lo, hi, False) for row in range(s.first, s.last)}
                tile |= {(s.bias, lo, hi, True)} if s.bias >= 0 else set()
        found.append(tile)
    return found


@pytest.mark.parametrize("block_m", [1, 16, 64, 128, 4095])
def test_lists_hold_each_active_column_once(block_m):
    one, _ = segments(REQUESTS)
    other, _ = segments([Request(225, 2, True)])
    columns = tile_columns([one, [], other], 225, block_m)
    assert columns.tiles == -(-225 // block_m)
    total, widest = 0, 0
    for part, these in enumerate((one, [], other)):
        for tile, want in enumerate(expected(these, 225, block_m)):
            got = active(columns, part, tile)
            assert len(got) == len(set(got))
            assert set(got) == want
            total, widest = total + len(got), max(widest, len(got))
    assert (columns.count, columns.widest, columns.capacity) == (total, widest, aligned(total))
    lists = (columns.starts, columns.pool_rows, columns.ranges)
    assert all((part.data_ptr() - columns.packed.data_ptr()) % 16 == 0 for part in lists)
    assert columns.mean == total / (3 * columns.tiles)


def test_segments_need_no_order_and_may_overlap():
    part = [RowSegment(20, 40, 5, 7), RowSegment(0, 30, 1, 3, bias=9), RowSegment(64, 65, 3, 4)]
    columns = tile_columns([part], 70, 32)
    got = [active(columns, 0, tile) for tile in range(3)]
    assert list(map(set, got)) == expected(part, 70, 32)


def test_lists_say_what_the_segments_say():
    it = case([REQUESTS], 24, 20)
    want = add_low_rank(F.linear(it.x, it.w, it.bias), it.x, it.pools[0].a, it.pools[0].b, it.slices[0])
    for block_m in (16, 128):
        got = reference.fused_lora_linear(it.x, it.w, it.bias, it.pools, it.columns(block_m))
        assert error(got, want) < 1e-14


def test_a_capacity_keeps_the_layout_of_another_batch():
    one = tile_columns([segments(REQUESTS)[0]], 225, 64, capacity=90)
    other = tile_columns([segments([Request(225, 3)])[0]], 225, 64, capacity=90)
    assert one.packed.shape == other.packed.shape
    lists = [active(other, 0, tile) for tile in range(other.tiles)]
    other.write_into(one)
    assert [active(one, 0, tile) for tile in range(one.tiles)] == lists


def test_what_does_not_fit_is_refused():
    part, _ = segments(REQUESTS)
    with pytest.raises(ValueError, match="columns for a capacity of 12; use a larger"):
        tile_columns([part], 225, 64, capacity=12)
    with pytest.raises(ValueError, match="tile height of 4096"):
        tile_columns([part], 225, 4096)
    with pytest.raises(ValueError, match="the graph has"):
        tile_columns([part], 225, 64).write_into(tile_columns([part], 225, 32))
    with pytest.raises(ValueError, match="a tile of 27 columns, the graph was recorded for 3"):
        tile_columns([part], 225, 64, 90).write_into(tile_columns([segments([Request(225, 3)])[0]], 225, 64, 90))


def test_an_empty_batch_has_no_tiles():
    columns = tile_columns([[]], 0, 64)
    assert (columns.tiles, columns.count, columns.widest, columns.mean) == (0, 0, 0, 0.0)
    assert torch.equal(columns.starts, torch.zeros(1, dtype=torch.int32))
