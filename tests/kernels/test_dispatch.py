"""What runs where, and that it says why. On a machine without CUDA everything is torch's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bertology_serve.kernels import dispatch, reference
from bertology_serve.kernels.dispatch import BatchColumns, choose, explain, lora_linear, tile_width
from bertology_serve.kernels.segments import RowSegment
from tests.kernels.deltas import Request, case, error

REQUESTS = [Request(5, 4), Request(1, 20, True), Request(3), Request(16, 0, True)]
CPU = torch.device("cpu")


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("recording", [False, True])
def test_on_cpu_torch_gives_the_reference(slices, recording):
    it = case([REQUESTS] * slices, 24, 30)
    want = reference.fused_lora_linear(it.x, it.w, it.bias, it.pools, it.columns(16), "gelu")
    with torch.set_grad_enabled(recording):
        got = lora_linear(it.x, it.w, it.bias, it.pools, it.slices, BatchColumns(25, CPU), "gelu")
    assert error(got, want) < 1e-14


def test_a_linear_without_deltas_is_the_linear():
    it = case([REQUESTS], 24, 30)
    got = lora_linear(it.x, it.w, it.bias, [], [], BatchColumns(25, CPU))
    assert torch.equal(got, torch.nn.functional.linear(it.x, it.w, it.bias))


def test_explain_names_the_reason():
    it = case([REQUESTS], 24, 30)
    assert explain(it.x, it.w, it.slices, BatchColumns(25, CPU)) == "torch: the device is cpu, and kernels need CUDA"


def test_capabilities_find_their_table():
    assert dispatch._table_of((9, 0)) == ("sm_90", "")
    assert dispatch._table_of((8, 9)) == ("sm_80", "sm_89 has no table of its own; sm_80 is nearest")
    assert dispatch._table_of((12, 0))[0] == "sm_80"
    assert dispatch._table_of((7, 5))[0] == ""


def test_a_gpu_would_get_the_tables_row(monkeypatch):
    monkeypatch.setattr(dispatch, "architecture", lambda device: ("sm_90", ""))
    it = case([[Request(300, 12), Request(400, 24)]], 48, 64)
    x, w, batch = it.x.bfloat16(), it.w.bfloat16(), BatchColumns(700, CPU)
    said = explain(x, w, it.slices, batch)
    assert said.startswith("fused 64x128x64, RT 32, sweep 1, 4 warps, 4 stages, TMA: table sm_90 (by rule")
    with_dropout = [[replace(s, dropout=0.1) for s in it.slices[0]]]
    assert explain(x, w, with_dropout, batch).startswith("torch: dropout")
    assert explain(x, w, [[]], batch).startswith("torch: table sm_90")
    assert explain(it.x, w, it.slices, batch) == "torch: no kernel for 1 slices of torch.float64"


def test_choice_is_laid_out_for_the_typical_tile():
    assert dispatch.typical(24.0, 48) == 32
    assert dispatch.typical(24.0, 24) == 24
    assert choose("sm_90", torch.float16, 768, 768, 1, 16384, 9).config.rank_tile == 16
    assert choose("sm_90", torch.float16, 768, 2304, 3, 16384, 33).config.rank_tile == 64


def test_columns_are_counted_once():
    it = case([REQUESTS], 8, 8)
    batch = BatchColumns(25, CPU)
    assert batch.columns(it.slices[0]) == 26
    assert batch.columns(()) == 0
    it.slices[0].clear()
    assert batch.columns(it.slices[0]) == 26


def test_tile_width_counts_as_the_lists_do():
    it = case([[Request(100, 3), Request(60, 5, True), Request(300), Request(7, 64)]], 8, 8)
    columns = it.columns(128)
    assert tile_width(it.slices[0], 467) == (columns.mean, columns.widest)
    assert tile_width([], 10) == (0.0, 0)


def test_lists_are_made_once_for_a_batch():
    parts = [[RowSegment(0, 9, 1, 3)]]
    batch = BatchColumns(9, CPU)
    assert batch.get(parts, 16) is batch.get([parts[0]], 16)
    assert batch.get(parts, 16) is not batch.get(parts, 32)
