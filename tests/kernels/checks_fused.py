"""What ``fused_lora_linear`` must do, on shapes chosen to break it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bertology_serve.kernels import reference
from bertology_serve.kernels.columns import Pools
from bertology_serve.kernels.fused_lora_linear import fused_lora_linear
from bertology_serve.kernels.tuning import FILLED, Config
from tests.kernels.deltas import Case, Request, Setting, case, poisoned

ONE = Config(16, 32, 32, 16, 1)
SWEEP = Config(16, 16, 32, 16, 3)
MIXED = (Request(5, 4), Request(1, 20, True), Request(3), Request(16, 0, True), Request(7, 1), Request(0, 3))


def agrees(it: Case, setting: Setting, config: Config, activation: str = "") -> torch.Tensor:
    """Runs a case poisoned, compares it with float64, and returns the output."""
    exact = it.rounded(setting.dtype)
    want = reference.fused_lora_linear(
        exact.x, exact.w, exact.bias, exact.pools, exact.columns(config.block_m), activation
    )
    given = it.cast(setting)
    with poisoned():
        columns = given.columns(config.block_m, setting.device)
        got = fused_lora_linear(given.x, given.w, given.bias, given.pools, columns, activation, config)
    setting.close(got, want)
    return got


def check_one_row(setting: Setting) -> None:
    agrees(case([[Request(1, 4, True)]], 64, 64), setting, ONE)
    agrees(case([[Request(1, 64)]], 64, 64), setting, SWEEP)


def check_mixed_kinds_at_prime_sizes(setting: Setting) -> None:
    for config in (ONE, SWEEP):
        agrees(case([MIXED], 37, 29), setting, config)


def check_one_to_64_ranks_in_one_tile(setting: Setting) -> None:
    requests = [Request(1, rank, rank % 5 == 0) for rank in range(1, 65)]
    agrees(case([requests], 33, 31), setting, Config(64, 32, 32, 64, 1))


def check_hundreds_of_deltas_overflow_every_tile(setting: Setting) -> None:
    requests = [Request(1, rank % 9, rank % 7 == 0) for rank in range(300)]
    agrees(case([requests], 32, 48), setting, Config(128, 16, 32, 32, 2))


def check_three_slices_with_lists_of_their_own(setting: Setting) -> None:
    v: Sequence[Request] = [replace(r, rank=(r.rank * 3) % 7) for r in MIXED]
    k = [replace(r, rank=0, bias=True) for r in MIXED]
    it = case([MIXED, k, v], 40, 3 * 29)
    agrees(it, setting, SWEEP)
    without_a = [it.pools[0], Pools(None, it.pools[1].b), it.pools[2]]
    agrees(replace(it, pools=without_a), setting, ONE)


def check_few_programs_walk_over_many_tiles(setting: Setting) -> None:
    requests = [Request(37, rank % 9, rank % 3 == 0) for rank in range(16)]
    it = case([requests, requests], 32, 2 * 32)
    assert FILLED < 2 * 2 * (37 * 16 // 16)
    once, walked = (agrees(it, setting, replace(ONE, block_n=16, persistent=on)) for on in (False, True))
    assert torch.equal(once, walked)


def check_activations(setting: Setting) -> None:
    for activation in ("gelu", "relu", "silu", "tanh"):
        agrees(case([MIXED], 32, 32), setting, ONE, activation)


def check_descriptors(setting: Setting) -> None:
    """Through tensor descriptors, ragged on every side."""
    agrees(case([MIXED], 40, 24), setting, replace(SWEEP, tma=True))


def check_weights_of_other_strides(setting: Setting) -> None:
    it = case([MIXED], 37, 29)
    given, columns = it.cast(setting), it.columns(16, setting.device)
    straight = fused_lora_linear(given.x, given.w, given.bias, given.pools, columns, config=ONE)
    turned = fused_lora_linear(given.x, given.w.T.contiguous().T, given.bias, given.pools, columns, config=ONE)
    assert torch.equal(straight, turned)


def check_rows_without_a_delta_are_those_of_the_plain_linear(setting: Setting) -> None:
    it = case([MIXED], 37, 29).cast(setting)
    for config in (ONE, SWEEP):
        columns = it.columns(16, setting.device)
        with_columns = fused_lora_linear(it.x, it.w, it.bias, it.pools, columns, config=config)
        plain = fused_lora_linear(it.x, it.w, it.bias, config=config)
        assert torch.equal(with_columns[6:9], plain[6:9])
        assert not torch.equal(with_columns[:6], plain[:6])


def check_pool_rows_do_not_matter(setting: Setting) -> None:
    """The same deltas at other pool rows give the same bits."""
    plain, moved = case([MIXED], 37, 29), case([MIXED], 37, 29, order=[3, 0, 5, 4, 1, 2])
    assert plain.slices != moved.slices
    assert torch.equal(agrees(plain, setting, SWEEP), agrees(moved, setting, SWEEP))


def check_no_rows_and_no_columns(setting: Setting) -> None:
    it = case([[Request(0, 4)]], 32, 32).cast(setting)
    assert fused_lora_linear(it.x, it.w, it.bias, it.pools, it.columns(16, setting.device), config=ONE).shape == (0, 32)
    agrees(case([[Request(17)]], 32, 32), setting, ONE)


def check_half_precision(setting: Setting) -> None:
    agrees(case([MIXED], 37, 29), replace(setting, dtype=torch.float16, tolerance=6e-4), SWEEP)
