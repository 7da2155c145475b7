"""On a GPU, in the sizes of BERT: what dispatch picks is right, no worse than torch, and the same from a CUDA graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bertology_serve.bench.kernels.methods import exact
from bertology_serve.bench.kernels.workload import Workload, batch_segments, inputs
from bertology_serve.kernels.columns import tile_columns
from bertology_serve.kernels.dispatch import BatchColumns, lora_linear, torch_linear
from bertology_serve.kernels.fused_lora_linear import fused_lora_linear
from bertology_serve.kernels.shrink_expand import split_lora_linear
from bertology_serve.kernels.tuning import Config
from tests.kernels.deltas import ON_GPU, error, poisoned

SHAPES = ((768, 768), (768, 3072), (3072, 768), (1024, 4096), (384, 1536))
WORSE_THAN_TORCH = 1.5


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("setting", ON_GPU, ids=lambda s: name(s.dtype))
@pytest.mark.parametrize("rows", [1, 127, 1024, 5000, 16384])
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize(("rank", "deltas"), [(16, 64), (64, 8), (4, 1000)])
def test_what_dispatch_picks_is_no_worse_than_torch(setting, rows, k, n, rank, deltas):
    device = torch.device("cuda")
    work = Workload(k, n, rows, rank, deltas, dtype=name(setting.dtype))
    parts, given = [batch_segments(work)], inputs(work, device, 0)
    want = exact(given, parts[0], rows)
    with poisoned():
        got = lora_linear(given.x, given.w, given.bias, given.pools, parts, BatchColumns(rows, device))
    found = error(got, want)
    assert found <= setting.tolerance
    if setting.dtype != torch.float32:  # there sums in one chain, as Triton's are, differ more than cuBLAS's in parts
        by_torch = error(torch_linear(given.x, given.w, given.bias, given.pools, parts), want)
        assert found <= WORSE_THAN_TORCH * by_torch + 1e-7


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("run", [fused_lora_linear, split_lora_linear], ids=["fused", "split"])
def test_a_graph_replays_other_deltas_and_other_counts(run):
    device = torch.device("cuda")
    config = Config(64, 128, 64, 32, 1, 4, 3, torch.cuda.get_device_capability()[0] >= 9)
    works = [Workload(768, 768, 1024, 16, deltas) for deltas in (2, 40, 13)]
    given = inputs(Workload(768, 768, 1024, 16, 40), device, 0)
    batches = [tile_columns([batch_segments(work)], 1024, config.block_m, capacity=4096) for work in works]
    fixed = replace(batches[0], widest=max(batch.widest for batch in batches)).to(device)
    call = lambda columns: run(given.x, given.w, given.bias, given.pools, columns, "", config)  # noqa: E731
    call(fixed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(fixed)
    for batch in batches[1:] + batches[:1]:
        batch.to(device).write_into(fixed)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, call(batch.to(device)))
