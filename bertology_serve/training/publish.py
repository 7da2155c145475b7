"""Saves a trained delta, proves the copy on disk, and only then gives it its name; describes saved ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from bertology_serve.data.records import Record
from bertology_serve.deltas import store
from bertology_serve.deltas.catalog import ADAPTER_CONFIG
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import rounding
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import VerificationError
from bertology_serve.files import JsonObject, replace_directory, staging
from bertology_serve.kinds.kinds import kind_of
from bertology_serve.tasks.base import Item
from bertology_serve.training.calibration import kept
from bertology_serve.training.evaluation import run

MOST_TOKENS, MOST_ITEMS = 4096, 64


def publish(
    delta: Delta,
    live: TrainableDelta,
    out: Path,
    items: Sequence[Item],
    records: Sequence[Record],
    extra: Iterable[Path] = (),
    fresh: Encoder | None = None,
) -> float:
    """Writes ``delta`` to the directory ``out``, with copies of the files ``extra`` beside it.

    It is written under a hidden name, loaded from there into a fresh encoder, and asked the first of the ``records``
    (whose ``items`` are ready for training) through the serving engine. Raises VerificationError, with nothing
    published, where a logit differs from the live delta's by more than float32 rounds (``rounding``).
    ``fresh`` takes the place of that encoder where it was loaded before (for deltas that leave it as it is). Returns
    the largest difference.
    """
    with staging(out) as own:
        stage = delta.save(own / "delta", live.encoder)
        with kept(live):
            live.head.adopt(delta.head)  # what the dev set settled is not in the live one
            live.task = delta.task
            difference = compare(stage, live, items, records, fresh)
        for path in extra:
            if path.exists():
                shutil.copy(path, stage)
        replace_directory(stage, out)
    return difference


def publish_copy(directory: Path, out: Path, extra: Iterable[Path] = ()) -> None:
    """Gives a delta that was published in one place a second one, ``out``, whole or not at all.

    Copies of the files ``extra`` take the place of those that lie beside the first.
    """
    with staging(out) as own:
        shutil.copytree(directory, own, dirs_exist_ok=True)
        for path in extra:
            if path.exists():
                shutil.copy(path, own)
        replace_directory(own, out)


def compare(
    directory: Path,
    live: TrainableDelta,
    items: Sequence[Item],
    records: Sequence[Record],
    fresh: Encoder | None = None,
) -> float:
    """The largest difference of logits between a live delta and its saved copy; raises VerificationError."""
    count = _count(items)
    expected = torch.cat([part.flatten() for item in items[:count] for part in run(live, [item])[1][0]])
    delta = store.load(directory)
    encoder = fresh or Encoder.for_delta(delta, live.encoder.name, device=str(live.encoder.device))
    pipeline = Pipeline(encoder)
    pipeline.add(delta)
    requests = (Request(delta.name, fields, logits=True, where=where) for fields, where in records[:count])
    found = torch.tensor([value for answer in pipeline.answer(requests) for value in _flat(answer.answer["logits"])])
    return _difference(expected, found, delta.name, encoder.anatomy.layers)


def _difference(expected: Tensor, found: Tensor, name: str, layers: int) -> float:
    if expected.shape != found.shape:
        raise VerificationError(
            f"delta {name!r}, loaded again, gives {found.numel()} logits for {expected.numel()}; nothing was published"
        )
    difference = float((expected - found).abs().max())
    allowed = rounding(layers, float(expected.abs().max()))
    if not difference <= allowed:
        raise VerificationError(
            f"delta {name!r}, loaded again, gives logits that differ by {difference:.2g} (allowed: {allowed:.2g}); "
            "nothing was published"
        )
    return difference


def _count(items: Sequence[Item]) -> int:
    """How many of the first items are compared: at least one, and no more than a few seconds' worth."""
    tokens = 0
    for count, item in enumerate(items[:MOST_ITEMS]):
        tokens += item.tokens
        if count and tokens > MOST_TOKENS:
            return count
    return min(len(items), MOST_ITEMS)


def _flat(values: Iterable[object]) -> Iterator[float]:
    for value in values:
        if isinstance(value, float):
            yield value
        else:
            yield from _flat(value)  # type: ignore[arg-type]  # lists of lists of floats


def describe(path: Path, delta: Delta) -> JsonObject:
    """What there is to know about a delta that was loaded from ``path``, ready for JSON."""
    components, head, weights = (
        sum(tensor.numel() for tensor in group.values()) for group in (delta.tensors, delta.head, delta.weights)
    )
    return {
        "name": delta.name,
        "version": delta.version,
        "kinds": list(delta.kinds),
        "specs": {kind_of(spec).name: asdict(spec) for spec in delta.specs},
        "task": {**asdict(delta.task), "labels": list(delta.task.labels)},
        "base": asdict(delta.base),
        "parameters": {"delta": components + weights, "head": head},
        "bytes": delta.bytes,
        "files": {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()},
        "peft": (path / ADAPTER_CONFIG).exists(),
        "metrics": dict(delta.metrics),
        "provenance": dict(delta.provenance),
        "valid": True,
    }
