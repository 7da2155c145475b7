"""Pooled rows of the frozen encoder, from one pass over the data, kept on disk under the hash of what made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from bertology_serve.encoder.batch import read_rows
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import FormatError
from bertology_serve.files import JsonObject
from bertology_serve.tasks.base import Item
from bertology_serve.tasks.heads import aggregate
from bertology_serve.training.batches import micro_batches
from bertology_serve.training.run_directory import read_checkpoint, write_checkpoint

Features = dict[int, Tensor]


def features(
    live: TrainableDelta, items: Sequence[Item], layers: Sequence[int], max_tokens: int, folder: Path
) -> Features:
    """By layer the rows [N, H] (float32) that a head of the live delta's task would read there, an item each.

    Layer 0 is what the embeddings put out, the last what the encoder does. A text's windows are put together: what a
    linear head makes of their mean is the mean of what it makes of them. The rows are read from ``folder`` where the
    same encoder, token ids, pooling and layers, run in the same way, left them; else they are computed and left there.
    """
    key = _key(live, items, layers, max_tokens)
    path = folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.safetensors"
    found = _read(path, key)
    if found is None:
        found = pooled(live, items, layers, max_tokens)
        _write(path, found, key)
    return found


@torch.inference_mode()
def pooled(live: TrainableDelta, items: Sequence[Item], layers: Sequence[int], max_tokens: int) -> Features:
    """The rows themselves, from one pass."""
    encoder, mode, place = live.encoder, live.training, {id(item): i for i, item in enumerate(items)}
    live.eval()
    rows = {layer: torch.empty(len(items), encoder.anatomy.hidden) for layer in layers}
    groups = micro_batches(items, max_tokens, not encoder.packs)
    encodings = [one for group in groups for item in group for one in item.encodings]
    ends = [0, *accumulate(sum(len(item.encodings) for item in group) for group in groups)]
    passes = encoder.layer_rows(*live.bank(), encodings, [range(*ends) for ends in pairwise(ends)], layers)
    for group, (members, batch, hidden) in zip(groups, passes, strict=True):
        order, own = sorted(range(batch.sequences), key=batch.order.__getitem__), [encodings[i] for i in members]
        for layer, found in hidden.items():
            read = aggregate(read_rows(found, batch, order, live.task), own, live.task)
            rows[layer][[place[id(item)] for item in group]] = read.float().cpu()
    live.train(mode)
    return rows


def _key(live: TrainableDelta, items: Sequence[Item], layers: Sequence[int], max_tokens: int) -> JsonObject:
    """Everything that the rows' bits depend on."""
    own = {"pooling": live.task.pooling, "layers": list(layers), "max_tokens": max_tokens}
    return origin(live, items) | own


def origin(live: TrainableDelta, items: Sequence[Item]) -> JsonObject:
    """What the bits of any rows of the frozen encoder depend on."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr([(encoding.ids, encoding.types, encoding.own) for encoding in item.encodings]).encode())
    encoder = live.encoder
    return {
        "weights": encoder.ref.sha256,
        "dtype": str(encoder.dtype),
        "device": encoder.device.type,
        "prepacked": encoder.prepacked,
        "tokens": digest.hexdigest(),
    }


def _read(path: Path, key: JsonObject) -> Features | None:
    """What lies there, if it is whole and what it is called; a damaged file is made anew."""
    if not path.exists():
        return None
    try:
        tensors, state = read_checkpoint(path)
    except FormatError:
        return None
    return {int(name): tensor for name, tensor in tensors.items()} if state == key else None


def _write(path: Path, rows: Features, key: JsonObject) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, {str(layer): tensor for layer, tensor in rows.items()}, key)
