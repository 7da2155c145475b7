"""Bottlenecks and norms against float64: interpreted always, compiled where there is a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bertology_serve.kernels import dispatch, reference
from bertology_serve.kernels.columns import tile_columns
from bertology_serve.kernels.dispatch import BatchColumns
from bertology_serve.kernels.layernorm import BLOCK_ROWS
from bertology_serve.kernels.segments import RowSegment
from tests.kernels import checks_rows
from tests.kernels.deltas import ON_GPU, case, error, normal
from tests.kernels.interpreting import checks, interpreted

CHECKS = checks(checks_rows)


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name):
    problem = interpreted(checks_rows.__name__)[name]
    assert not problem, problem


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ON_GPU, ids=lambda s: str(s.dtype))
@pytest.mark.parametrize("name", CHECKS)
def test_on_gpu(name, setting):
    CHECKS[name](setting)


HIDDEN, TOKENS = 24, 25


@pytest.mark.parametrize("recording", [False, True])
def test_adapters_by_torch_are_the_reference(recording):
    it = case([checks_rows.ADAPTERS], HIDDEN, HIDDEN)
    shift, other = normal(it.pools[0].b.shape[0], 1, seed=1), normal(TOKENS, HIDDEN, seed=2)
    [(down, up)] = it.pools
    tanh = [replace(s, activation="tanh") for s in it.slices[0] if s.last > s.first]
    want = reference.grouped_bottleneck_adapter(other, it.x, down, shift, up, tile_columns([tanh], TOKENS, 16), "tanh")
    kept = other.clone()
    with torch.set_grad_enabled(recording):
        got = dispatch.adapters(other, it.x, down, shift, up, tanh, BatchColumns(TOKENS, torch.device("cpu")))
    assert error(got, want) < 1e-14
    assert torch.equal(other, kept)


def test_norms_by_torch_are_the_reference():
    it = case([checks_rows.BIASES], HIDDEN, HIDDEN)
    weight, residual = normal(HIDDEN, seed=1), normal(it.x.shape[0], HIDDEN, seed=2)
    batch = BatchColumns(it.x.shape[0], torch.device("cpu"))
    pool = it.pools[0].b
    with torch.inference_mode():
        got = dispatch.norm(it.x, weight, it.bias, 1e-5, residual, pool, it.slices[0], batch)
        assert error(got, reference.layer_norm(it.x, weight, it.bias, 1e-5, residual, pool, it.columns(4))) < 1e-14


def test_lists_of_one_activation_are_made_once():
    segments = [RowSegment(0, 2, 1, 3, 3, activation="relu"), RowSegment(2, 4, 4, 6, 6, activation="tanh")]
    batch = BatchColumns(4, torch.device("cpu"))
    assert batch.of_activation(segments, "tanh") == segments[1:]
    assert batch.of_activation(segments, "tanh") is batch.of_activation(segments, "tanh")


def test_the_norms_tiles_are_one_height():
    assert dispatch.NORM_ROWS == BLOCK_ROWS
