"""Attention in one launch against attention group by group; without a GPU, torch's launch by its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.encoder import attention
from bertology_serve.encoder.attention import make_layout, packed_attention
from bertology_serve.encoder.bank import BARE, PREFIX, DeltaBank
from bertology_serve.encoder.batch import PackedBatch, pack
from bertology_serve.kinds.effects import Effects, PrefixEffect
from bertology_serve.tasks.spec import Encoding
from tests import tiny

HEADS, WIDTH = 4, 8


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, keys: Tensor, longest: int, longest_key: int, **how: Any
) -> Tensor:
    """What torch documents: each sequence's queries see its keys, at most so far to the left and right."""
    assert rows.dtype == keys.dtype == torch.int32
    assert longest >= int(rows.diff().max())
    assert longest_key >= int(keys.diff().max())
    left, _ = how["window_size"]
    parts = []
    for i in range(len(rows) - 1):
        q, k, v = query[rows[i] : rows[i + 1]], key[keys[i] : keys[i + 1]], value[keys[i] : keys[i + 1]]
        far = (torch.arange(len(q))[:, None] - torch.arange(len(k))[None, :]).abs() > left
        mask = None if left < 0 else ~far
        one = F.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask, scale=how["scale"]
        )
        parts.append(one.transpose(0, 1))
    return torch.cat(parts)


def mixed(folder: Path, prefixes: tuple[int, ...], device: str = "cpu") -> tuple[PackedBatch, DeltaBank]:
    """Ten sequences; as many deltas as there are prefix lengths (0: the bare base)."""
    encoder = tiny.encoder("bert", folder)
    bank = DeltaBank(encoder.anatomy, torch.float32, torch.device(device))
    entries = [
        bank.add(f"d{i}", Effects(prefix=PrefixEffect(torch.randn(3, v, 32), torch.randn(3, v, 32)))) if v else BARE
        for i, v in enumerate(prefixes)
    ]
    encodings = [Encoding(list(range(4, 4 + n)), [0] * n) for n in (3, 7, 1, 7, 12, 2, 9, 3, 5, 20)]
    owners = [entries[i % len(entries)] for i in range(len(encodings))]
    return pack(encodings, owners, encoder.anatomy, torch.device(device)), bank


@pytest.mark.parametrize(("prefixes", "window"), [((0,), None), ((0,), 2), ((4, 0, 1), None)])
def test_one_launch_is_group_by_group(tmp_path, monkeypatch, prefixes, window):
    torch.manual_seed(0)
    batch, bank = mixed(tmp_path, prefixes)
    pools = (bank.layer(PREFIX, "k", 1), bank.layer(PREFIX, "v", 1)) if any(prefixes) else None
    query, key, value = torch.randn(3, batch.rows, HEADS, WIDTH)
    want = packed_attention(query, key, value, make_layout(batch), scale=0.3, window=window, prefix=pools)
    monkeypatch.setattr(attention, "_torch_varlen", lambda: by_definition)
    found = attention.varlen_attention(
        query, key, value, attention.extents(batch), scale=0.3, window=window, prefix=pools
    )
    assert (found - want).abs().max() < 1e-6


def test_only_16_bits_on_a_gpu_go_this_way():
    assert not attention.fits(torch.zeros(1, HEADS, WIDTH))
    assert not attention.fits(torch.zeros(1, HEADS, WIDTH, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("prefixes", [(0,), (4, 0, 1)])
@torch.inference_mode()
def test_torchs_launch_on_gpu(tmp_path, prefixes):
    batch, bank = mixed(tmp_path, prefixes, "cuda")
    pools = (bank.layer(PREFIX, "k", 1).half(), bank.layer(PREFIX, "v", 1).half()) if any(prefixes) else None
    query, key, value = torch.randn(3, batch.rows, HEADS, WIDTH, device="cuda", dtype=torch.half)
    assert attention.fits(query)
    found = packed_attention(query, key, value, make_layout(batch), scale=0.3, prefix=pools)
    exact = None if pools is None else (pools[0].float(), pools[1].float())
    want = packed_attention(query.float(), key.float(), value.float(), make_layout(batch), scale=0.3, prefix=exact)
    assert (found - want).abs().max() < 5e-3
