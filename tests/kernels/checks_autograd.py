"""Gradients of the fused linear against those of the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import torch

from bertology_serve.kernels import reference
from bertology_serve.kernels.autograd import differentiable_lora_linear
from bertology_serve.kernels.columns import Pools
from bertology_serve.kernels.tuning import Config
from tests.kernels.deltas import Case, Request, Setting, case, normal, poisoned, surrounded

CONFIG = Config(16, 16, 32, 16, 2)
MIXED = (Request(5, 4), Request(1, 20, True), Request(3), Request(16, 0, True), Request(7, 1), Request(0, 3))
FACTOR = 2.0  # a gradient sums products of rounded sums


def gradients(it: Case, setting: Setting, config: Config = CONFIG) -> None:
    """Every gradient of a case: poisoned memory, float64 beside it."""
    exact, given = it.rounded(setting.dtype), it.cast(setting)
    dy = normal(it.x.shape[0], it.w.shape[0], seed=8)
    columns = it.columns(config.block_m)
    want = _run(exact, lambda e: reference.fused_lora_linear(e.x, e.w, e.bias, e.pools, columns), dy)
    lists = given.columns(config.block_m, setting.device)
    owned = [torch.zeros(p.b.shape[0], dtype=torch.bool) for p in it.pools]
    for mask, part in zip(owned, it.slices, strict=True):
        for s in part:
            mask[s.first : s.last] = True
            mask[max(s.bias, 0)] = mask[max(s.bias, 0)] | (s.bias >= 0)
    with poisoned():
        got = _run(
            given,
            lambda e: differentiable_lora_linear(e.x, e.w, e.bias, e.pools, lists, config),
            surrounded(setting.put(dy)),
        )
    allowed = replace(setting, tolerance=FACTOR * setting.tolerance)
    for name, reference_gradient in want.items():
        if reference_gradient is not None:
            found = got[name]
            assert found is not None, name
            allowed.close(found, reference_gradient)


def _run(it, forward, dy) -> dict[str, torch.Tensor | None]:
    names = {"x": it.x, "w": it.w, "bias": it.bias}
    for i, pool in enumerate(it.pools):
        names |= {f"{n}{i}": t for n, t in (("a", pool.a), ("b", pool.b)) if t is not None}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in names.items()}
    leaves["x"] = surrounded(it.x.detach()).requires_grad_()
    pools = [Pools(leaves.get(f"a{i}"), leaves[f"b{i}"]) for i in range(len(it.pools))]
    y = forward(replace(it, x=leaves["x"], w=leaves["w"], bias=leaves["bias"], pools=pools))
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True), strict=True))


def check_all_gradients_at_prime_sizes(setting: Setting) -> None:
    gradients(case([MIXED], 37, 29), setting)


def check_hundreds_of_deltas(setting: Setting) -> None:
    gradients(case([[Request(1, i % 5, i % 7 == 0) for i in range(120)]], 24, 20), setting, Config(64, 32, 32, 16, 1))


def check_three_slices(setting: Setting) -> None:
    biases = [replace(r, rank=0, bias=True) for r in MIXED]
    it = case([MIXED, biases, [Request(32, 2)]], 40, 3 * 16)
    gradients(replace(it, pools=[it.pools[0], Pools(None, it.pools[1].b), it.pools[2]]), setting)


def check_a_delta_that_comes_twice_sums(setting: Setting) -> None:
    it = case([[Request(9, 3, True), Request(20, 2), Request(8, 3, True)]], 32, 32)
    first = it.slices[0][0]
    again = replace(it.slices[0][2], first=first.first, last=first.last, bias=first.bias)
    gradients(replace(it, slices=[[first, it.slices[0][1], again]]), setting)


def check_the_same_bits_every_time(setting: Setting) -> None:
    it = case([MIXED], 37, 29).cast(setting)
    columns = it.columns(16, setting.device)
    dy = setting.put(normal(32, 29, seed=8))
    runs = [
        _run(it, lambda e: differentiable_lora_linear(e.x, e.w, e.bias, e.pools, columns, CONFIG), dy) for _ in range(2)
    ]
    for name, first in runs[0].items():
        second = runs[1][name]
        assert first is not None
        assert second is not None
        assert torch.equal(first, second), name
