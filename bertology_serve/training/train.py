"""Trains one delta from records to a published directory: the whole life, in the order in which it happens."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import bertology_serve
from bertology_serve.data.examples import infer_labels
from bertology_serve.deltas.catalog import identify
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.live import LiveDelta
from bertology_serve.tasks.base import Task
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.training.config import TrainConfig
from bertology_serve.training.destination import Destination
from bertology_serve.training.device import uses_bf16
from bertology_serve.training.items import Item, make_items
from bertology_serve.training.loop import Trainer
from bertology_serve.training.methods import ParameterCount, count_parameters, make_live, start_at_mean
from bertology_serve.training.publish import publish
from bertology_serve.training.rundir import LOG
from bertology_serve.training.sources import Source
from bertology_serve.training.state import RunState
from bertology_serve.training.watch import Silent, Watcher

# What may change between a run and its continuation, because no number depends on it.
FREE = ("save_every",)


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs in memory: the live delta, its task, and the examples made ready."""

    live: LiveDelta
    task: Task
    items: list[Item]
    dev: list[Item]


@dataclass(frozen=True)
class Outcome:
    """What came of a run: the delta, where it lies, and how the copy there compares (see ``publish``)."""

    delta: Delta
    path: Path
    parameters: ParameterCount
    state: RunState
    difference: float


def prepare(config: TrainConfig, encoder: Encoder, train: Source, dev: Source | None = None) -> Prepared:
    """Finds the labels, checks and tokenises every record, and makes the live delta.

    Raises DataError naming file and row: for a label of ``dev`` that ``train`` does not have, too.
    """
    spec = task_spec(config, encoder, train)
    live, task = make_live(encoder, config, spec), task_for(spec)
    items = make_items(task, train.records, encoder.tokenizer)
    start_at_mean(live, items)
    return Prepared(live, task, items, make_items(task, dev.records, encoder.tokenizer) if dev else [])


def train(
    config: TrainConfig,
    encoder: Encoder,
    train: Source,
    dev: Source | None = None,
    *,
    place: Destination,
    watcher: Watcher | None = None,
) -> Outcome:
    """Trains, saves, compares and publishes one delta.

    The encoder is changed by ``full``, and must not be used for anything else meanwhile.
    """
    name, directory = place.open()
    ready = prepare(config, encoder, train, dev)
    began = directory.open(_identity(config, encoder, name, train, dev), machine(config, encoder), place.resume)
    lay_out(encoder, began)
    state = Trainer(ready.live, ready.task, ready.items, config, ready.dev, directory, watcher or Silent()).run()
    counts = count_parameters(ready.live)
    delta = ready.live.freeze(
        name, place.version or "", state.metrics, _provenance(config, counts, state, train, dev, encoder)
    )
    sample = (ready.dev, dev.records) if dev else (ready.items, train.records)
    difference = publish(delta, ready.live, directory.out, *sample, extra=[directory.path / LOG])
    directory.remove()
    return Outcome(replace(delta, version=identify(directory.out).version), directory.out, counts, state, difference)


def machine(config: TrainConfig, encoder: Encoder) -> dict[str, bool]:
    """What a timing decides, and must not change in the course of a run."""
    return {"prepacked": not uses_bf16(config.precision, encoder.device) and encoder.prepack()}


def lay_out(encoder: Encoder, chosen: Mapping[str, bool]) -> None:
    """Runs the frozen linears as the run began: oneDNN's last bits are not those of plain linears."""
    encoder.prepack(True) if chosen["prepacked"] else encoder.unpack_weights()


def task_spec(config: TrainConfig, encoder: Encoder, train: Source) -> TaskSpec:
    """The task, with the labels of the training data and a length that the encoder reads, where none were given."""
    spec = config.task_spec(config.labels or infer_labels(config.task, train.records))
    return spec if config.max_length else replace(spec, max_length=min(spec.max_length, encoder.max_tokens))


def _identity(config: TrainConfig, encoder: Encoder, name: str, train: Source, dev: Source | None) -> dict[str, Any]:
    """What a run and its continuation must have in common."""
    own = {key: value for key, value in config.as_dict().items() if key not in FREE}
    return own | {
        "name": name,
        "backbone": f"{encoder.name}, weights {encoder.ref.sha256[:12]}",
        "device": encoder.device.type,
        "train": train.fingerprint,
        "eval": dev.fingerprint if dev else None,
    }


def _provenance(
    config: TrainConfig, counts: ParameterCount, state: RunState, train: Source, dev: Source | None, encoder: Encoder
) -> dict[str, Any]:
    """How the delta came to be, for its manifest and card."""
    device = encoder.device
    return {
        "training": config.as_dict(),
        "train": train.facts(),
        "eval": dev.facts() if dev else None,
        "kept": f"step {state.best_step if config.keep == 'best' and dev else state.step} of {state.step}",
        "trained_parameters": counts.trained,
        "seconds": round(state.seconds, 1),
        "hardware": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "bertology-serve": bertology_serve.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(UTC).date().isoformat(),
    }
