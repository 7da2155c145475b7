"""Bottleneck adapters, LayerNorm, embeddings and heads, on shapes chosen to break them."""

from __future__ import annotations

import torch

from bertology_serve.kernels import reference
from bertology_serve.kernels.bottleneck import grouped_bottleneck_adapter
from bertology_serve.kernels.layernorm import BLOCK_ROWS, layer_norm
from bertology_serve.kernels.tuning import Config
from tests.kernels.deltas import Request, Setting, case, normal, poisoned, surrounded

CONFIG = Config(16, 16, 32, 32)
ADAPTERS = (Request(5, 4, True), Request(1, 40, True), Request(3), Request(16, 8, True), Request(0, 3, True))
BIASES = (Request(5, 0, True), Request(1, 0, True), Request(3), Request(16, 0, True), Request(2))


def adapters_agree(requests: tuple[Request, ...], hidden: int, setting: Setting, activation: str) -> torch.Tensor:
    it = case([requests], hidden, hidden)
    exact, given = it.rounded(setting.dtype), it.cast(setting)
    shift = normal(it.pools[0].b.shape[0], 1, seed=40).to(setting.dtype).double()
    other = normal(*it.x.shape, seed=41).to(setting.dtype).double()
    [(down, up)], [(d, u)] = exact.pools, given.pools
    assert down is not None
    assert d is not None
    columns = it.columns(16)
    want = reference.grouped_bottleneck_adapter(other, exact.x, down, shift, up, columns, activation)
    with poisoned():
        lists = columns.to(torch.device(setting.device))
        residual = surrounded(setting.put(other))
        got = grouped_bottleneck_adapter(residual, given.x, d, setting.put(shift), u, lists, activation, CONFIG)
    setting.close(got, want)
    return got


def check_adapters_mixed_and_overflowing(setting: Setting) -> None:
    for activation in ("relu", "gelu"):
        adapters_agree(ADAPTERS, 37, setting, activation)
    adapters_agree((Request(1, 64, True),), 64, setting, "silu")
    adapters_agree(tuple(Request(1, 1 + i % 9, True) for i in range(60)), 32, setting, "tanh")


def check_rows_without_an_adapter_keep_their_bits(setting: Setting) -> None:
    got = adapters_agree(ADAPTERS, 37, setting, "relu")
    other = normal(25, 37, seed=41).to(setting.dtype)
    assert torch.equal(got[6:9].cpu(), other[6:9])
    bare = adapters_agree((Request(17),), 32, setting, "relu")
    assert torch.equal(bare.cpu(), normal(17, 32, seed=41).to(setting.dtype))


def check_layer_norm(setting: Setting) -> None:
    for hidden, tokens in ((37, 27), (64, 27), (768, 27)):
        it = case([BIASES], hidden, hidden)
        exact, given = it.rounded(setting.dtype), it.cast(setting)
        weight, residual = (
            normal(*s, seed=i).to(setting.dtype).double() for i, s in enumerate([(hidden,), (tokens, hidden)])
        )
        lists = it.columns(BLOCK_ROWS)
        moved = lists.to(torch.device(setting.device))
        for added, pool, bias in ((residual, exact.pools[0].b, exact.bias), (None, None, None)):
            columns = lists if pool is not None else None
            want = reference.layer_norm(exact.x, weight, bias, 1e-5, added, pool, columns)
            with poisoned():
                got = layer_norm(
                    given.x,
                    setting.put(weight),
                    None if bias is None else given.bias,
                    1e-5,
                    None if added is None else surrounded(setting.put(added)),
                    None if pool is None else given.pools[0].b,
                    None if pool is None else moved,
                )
            setting.close(got, want)


def check_layer_norm_of_one_row(setting: Setting) -> None:
    x, weight = normal(1, 31, seed=1).to(setting.dtype).double(), normal(31, seed=2).to(setting.dtype).double()
    with poisoned():
        got = layer_norm(setting.put(x), setting.put(weight))
    setting.close(got, reference.layer_norm(x, weight))
