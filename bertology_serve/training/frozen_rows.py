"""Rows of the frozen encoder, from one pass over the data, kept on disk under the hash of what made them.

``features`` are pooled rows, for probes; ``FrozenPrefixCache`` keeps what enters the lowest layer that is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bertology_serve.encoder.batch import PackedBatch, read_rows
from bertology_serve.encoder.sharing import Text, text_of
from bertology_serve.encoder.trainable import TrainableDelta, lowest_trained
from bertology_serve.errors import FormatError, SpecError
from bertology_serve.files import JsonObject, replacing
from bertology_serve.tasks.base import Item
from bertology_serve.tasks.heads import aggregate
from bertology_serve.tasks.spec import Encoding
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
    key = origin(live, items) | {"pooling": live.task.pooling, "layers": list(layers), "max_tokens": max_tokens}
    path = _place(folder, key, "safetensors")
    found = _read(path, key)
    if found is None:
        found = pooled(live, items, layers, max_tokens)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, {str(layer): tensor for layer, tensor in found.items()}, key)
    return found


def _place(folder: Path, key: JsonObject, suffix: str) -> Path:
    return folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.{suffix}"


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
        own = [encodings[i] for i in members]
        for layer, found in hidden.items():
            read = aggregate(read_rows(found, batch, batch.places, live.task), own, live.task)
            rows[layer][[place[id(item)] for item in group]] = read.float().cpu()
    live.train(mode)
    return rows


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


class FrozenPrefixCache:
    """What enters the lowest trained layer, for every sequence of some items: a memory map [sum of lengths, H].

    ``over`` is a ``TrainableDelta.around``: while it holds, the layers below are passed by and that layer gets the kept
    rows. They were made without dropout. The file lies under the hash of all that the rows depend on.
    """

    def __init__(self, live: TrainableDelta, items: Sequence[Item], max_tokens: int, folder: Path) -> None:
        self.live, self.layer = live, lowest_trained(live)
        _check(live, self.layer)
        self.paths = live.encoder.anatomy.layer_paths
        self.places: dict[Text, tuple[int, int]] = {}
        fresh = [item for item in items if self._enter(item)]
        total = sum(length for _, length in self.places.values())
        key = {**origin(live, fresh), "layer": self.layer, "max_tokens": max_tokens, "rows": total}
        path = _place(folder, key, "npy")
        if not path.exists():
            self._fill(path, fresh, total, max_tokens)
        self.rows = np.load(path, mmap_mode="r")
        self.extras = extras(live, items[0].encodings[:1], self.paths[0])

    @contextmanager
    def over(self, encodings: Sequence[Encoding], batch: PackedBatch) -> Iterator[None]:
        """Runs only the layers from the lowest trained one up; all of them where a sequence is not known."""
        if any(text_of(encoding) not in self.places for encoding in encodings):
            yield
            return
        extents = [self.places[text_of(encodings[i])] for i in batch.order]
        kept = np.concatenate([self.rows[start : start + length] for start, length in extents])
        rows = torch.from_numpy(kept).to(self.live.encoder.device).unsqueeze(0)
        modules = [self.live.encoder.model.get_submodule(path) for path in self.paths]
        with ExitStack() as stack:
            for module in modules[: self.layer]:
                stack.enter_context(_passed_by(module, self.extras))
            stack.enter_context(_entered(modules[self.layer], rows))
            yield

    def _enter(self, item: Item) -> bool:
        """Gives an item's sequences their places; whether any of them is new."""
        new = [encoding for encoding in dict.fromkeys(item.encodings) if text_of(encoding) not in self.places]
        for encoding in new:
            last = next(reversed(self.places.values()), (0, 0))
            self.places[text_of(encoding)] = (sum(last), len(encoding))
        return bool(new)

    def _fill(self, path: Path, items: Sequence[Item], total: int, max_tokens: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (total, self.live.encoder.anatomy.hidden)
        with replacing(path) as own:
            rows = np.lib.format.open_memmap(own, "w+", np.float32, shape)
            for group in micro_batches(items, max_tokens, padded=False):
                encodings = [encoding for item in group for encoding in item.encodings]
                hidden, batch = below(self.live, encodings, self.paths[self.layer])
                for packed, original in enumerate(batch.order):
                    start, length = self.places[text_of(encodings[original])]
                    first = batch.starts[packed]
                    rows[start : start + length] = hidden[first : first + length].float().cpu().numpy()
            rows.flush()


class _Reached(Exception):
    """The pass has come to the layer that was waited for."""


@torch.no_grad()
def below(live: TrainableDelta, encodings: Sequence[Encoding], path: str) -> tuple[Tensor, PackedBatch]:
    """The rows [T, H] that enter the layer at ``path``, without dropout; the pass ends there."""
    seen: list[Any] = []

    def stop(module: torch.nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        seen.append(inputs[0] if inputs else named["hidden_states"])
        raise _Reached

    @contextmanager
    def caught(_: Sequence[Encoding], batch: PackedBatch) -> Iterator[None]:
        seen.append(batch)
        yield

    mode, around, live.around = live.training, live.around, caught
    live.eval()
    handle = live.encoder.model.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        live.hidden(encodings)
    except _Reached:
        pass
    finally:
        handle.remove()
        live.around = around
        live.train(mode)
    batch, hidden = seen
    return hidden.reshape(batch.rows, -1), batch


@torch.no_grad()
def extras(live: TrainableDelta, encodings: Sequence[Encoding], path: str) -> int | None:
    """How many values a layer gives beside its hidden states (DeBERTa: one); ``None`` where it gives them bare."""
    seen: list[Any] = []
    handle = live.encoder.model.get_submodule(path).register_forward_hook(lambda _, __, out: seen.append(out))
    live.hidden(encodings)
    handle.remove()
    return len(seen[0]) - 1 if isinstance(seen[0], tuple) else None


@contextmanager
def _passed_by(module: torch.nn.Module, extras: int | None) -> Iterator[None]:
    def hand_through(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor | None, ...]:
        return hidden_states if extras is None else (hidden_states, *[None] * extras)

    assert "forward" not in vars(module)
    module.forward = hand_through
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _entered(module: torch.nn.Module, rows: Tensor) -> Iterator[None]:
    """The module gets ``rows`` [1, T, H] as its hidden states."""

    def put(_: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        return ((rows, *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": rows})

    handle = module.register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _check(live: TrainableDelta, layer: int) -> None:
    """Raises SpecError where there is nothing to keep, or the rows could not be put back."""
    if not live.encoder.packs:
        raise SpecError(f"trunk_cache keeps unpadded rows, but {live.encoder.anatomy.family} is padded; leave it out")
    if layer == 0:
        raise SpecError("trunk_cache keeps what frozen lower layers put out, but the lowest is changed; leave it out")
    if layer == live.encoder.anatomy.layers:
        raise SpecError("trunk_cache has no trained layer to feed: only the head is; take --recipe lp, which caches")
