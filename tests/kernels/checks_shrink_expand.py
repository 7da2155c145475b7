"""The two-launch form and the unfused pair must compute what the fused kernel does."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from bertology_serve.kernels import reference
from bertology_serve.kernels.columns import active
from bertology_serve.kernels.fused_lora_linear import fused_lora_linear
from bertology_serve.kernels.shrink_expand import lora_expand, segmented_lora_shrink, split_lora_linear
from bertology_serve.kernels.tuning import Config
from tests.kernels.deltas import Case, Request, Setting, case, poisoned

CONFIG = Config(16, 16, 32, 16, 2)
MIXED = (Request(5, 4), Request(1, 20, True), Request(3), Request(16, 0, True), Request(7, 1), Request(0, 3))
MANY = [Request(1, rank % 9, rank % 7 == 0) for rank in range(150)]
CASES = {
    "one row": ([[Request(1, 64, True)]], 64, 64),
    "primes": ([MIXED], 37, 29),
    "overflow": ([MANY], 33, 31),
    "slices": ([MIXED, [Request(32, 0, True)], [Request(32, 2)]], 40, 3 * 29),
    "K in parts": ([MIXED, [Request(32, 2)]], 256, 2 * 24),
    "nothing": ([[Request(17)]], 32, 32),
}


def check_coefficients(setting: Setting) -> None:
    for arguments in CASES.values():
        it = case(*arguments)
        given, exact = it.cast(setting), it.rounded(setting.dtype)
        columns = given.columns(16, setting.device)
        with poisoned():
            got = segmented_lora_shrink(given.x, given.pools, columns, CONFIG)
        setting.close(got.sum(0)[: columns.count], wanted(exact))


def wanted(it: Case) -> torch.Tensor:
    """Coefficients [C, 16] column by column."""
    columns, out = it.columns(16), []
    for part, pool in enumerate(it.pools):
        for tile in range(columns.tiles):
            for row, lo, hi, is_bias in active(columns, part, tile):
                s = torch.zeros(16, dtype=torch.float64)
                assert pool.a is not None
                s[lo - tile * 16 : hi - tile * 16] = 1.0 if is_bias else it.x[lo:hi] @ pool.a[row]
                out.append(s)
    return torch.stack(out) if out else torch.zeros(0, 16, dtype=torch.float64)


def check_two_launches(setting: Setting) -> None:
    for arguments in CASES.values():
        it = case(*arguments)
        given, exact = it.cast(setting), it.rounded(setting.dtype)
        want = reference.fused_lora_linear(exact.x, exact.w, exact.bias, exact.pools, exact.columns(16), "gelu")
        with poisoned():
            columns = given.columns(16, setting.device)
            got = split_lora_linear(given.x, given.w, given.bias, given.pools, columns, "gelu", CONFIG)
        setting.close(got, want)


def check_unfused_pair(setting: Setting) -> None:
    for arguments in CASES.values():
        it = case(*arguments)
        given, exact = it.cast(setting), it.rounded(setting.dtype)
        columns = given.columns(16, setting.device)
        want = reference.fused_lora_linear(exact.x, exact.w, exact.bias, exact.pools, exact.columns(16))
        y = F.linear(given.x, given.w, given.bias)
        got = lora_expand(y, segmented_lora_shrink(given.x, given.pools, columns, CONFIG), given.pools, columns, CONFIG)
        assert got is y
        allowed = Setting(setting.device, setting.dtype, 1.5 * setting.tolerance)  # the pair rounds y twice
        allowed.close(got, want)


def check_rows_without_a_delta_are_those_of_the_plain_linear(setting: Setting) -> None:
    it = case([MIXED], 37, 29).cast(setting)
    columns = it.columns(16, setting.device)
    split = split_lora_linear(it.x, it.w, it.bias, it.pools, columns, config=CONFIG)
    plain = fused_lora_linear(it.x, it.w, it.bias, config=CONFIG)
    assert torch.equal(split[6:9], plain[6:9])
