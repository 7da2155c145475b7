"""Trains a fleet from its records to published directories, in the order in which it happens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bertology_serve.deltas.catalog import identify
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import SpecError
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.training.batches import Data, Item, Source, make_items, shaped
from bertology_serve.training.calibration import settled
from bertology_serve.training.evaluate import measure
from bertology_serve.training.fleet.fleet import Fleet
from bertology_serve.training.fleet.fleet_directory import FleetDirectory, FleetWatcher, Quiet
from bertology_serve.training.fleet.fleet_spec import FleetSpec, MemberSpec
from bertology_serve.training.fleet.member import Member, check_frozen
from bertology_serve.training.methods import count_parameters, make_live, start_at_mean
from bertology_serve.training.publish import publish
from bertology_serve.training.run_directory import identity, provenance
from bertology_serve.training.train import lay_out, machine, task_spec

# Rows of one pass where none were asked for. On a CPU more no longer fit its caches; a GPU wants to be full.
ROWS = {"cpu": 512}
ROWS_ELSEWHERE = 8192

Columns = tuple[tuple[str, str], ...]


@dataclass
class Shelf:
    """Records and tokenised items, each read and made once however many members want them."""

    encoder: Encoder
    sources: dict[tuple[str, Columns], Source] = field(default_factory=dict)
    items: dict[tuple[int, TaskSpec], list[Item]] = field(default_factory=dict)

    def source(self, path: str, columns: Mapping[str, str]) -> Source:
        """The records of a file or hub data set."""
        key = path, tuple(sorted(columns.items()))
        if key not in self.sources:
            self.sources[key] = Source.read(path, columns)
        return self.sources[key]

    def made(self, source: Source | None, spec: TaskSpec) -> list[Item]:
        """The records ready for a task."""
        if source is None:
            return []
        key = id(source), spec
        if key not in self.items:
            self.items[key] = make_items(task_for(spec), source.records, self.encoder.tokenizer)
        return self.items[key]


@dataclass(frozen=True)
class Enrolled:
    """A member with its data, as the end of its training needs them."""

    member: Member
    data: Data
    ood: list[Item]


def enrol(
    spec: FleetSpec, encoder: Encoder, directory: FleetDirectory | None = None, watcher: FleetWatcher | None = None
) -> list[Enrolled]:
    """Reads and checks all data and makes every member. Raises DataError and SpecError naming the delta."""
    shelf = Shelf(encoder)
    return [_enrolled(one, shelf, directory, watcher) for one in spec.members]


def _enrolled(
    one: MemberSpec, shelf: Shelf, directory: FleetDirectory | None, watcher: FleetWatcher | None
) -> Enrolled:
    check_frozen(one.name, one.config)
    sources = [shelf.source(path, one.columns) if path else None for path in (one.train, one.eval, one.ood)]
    train = sources[0]
    assert train is not None
    spec = task_spec(one.config, shelf.encoder, train)
    live, (items, dev, ood) = make_live(shelf.encoder, one.config, spec), [shelf.made(s, spec) for s in sources]
    start_at_mean(live, items)
    items = shaped(task_for(spec), items, one.config.balance, one.config.label_smoothing)
    member = Member(one.name, live, task_for(spec), items, one.config, dev, directory, watcher)
    return Enrolled(member, Data(train, sources[1], sources[2]), ood)


def train_fleet(
    spec: FleetSpec,
    encoder: Encoder,
    root: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watcher: FleetWatcher | None = None,
) -> dict[str, Delta]:
    """Trains all deltas of a fleet together; each is published as ``root/NAME`` as soon as it is done.

    Returns the deltas by name. Raises SpecError naming those that failed once the others stand in their places.
    """
    root, watcher = Path(os.path.abspath(root)), watcher or Quiet()
    directory = FleetDirectory(root)
    directory.check_members([one.name for one in spec.members], resume, overwrite)
    crew = enrol(spec, encoder, directory, watcher)
    rows = spec.max_tokens or ROWS.get(encoder.device.type, ROWS_ELSEWHERE)
    began = directory.open(_identity(rows, encoder, crew), machine(crew[0].member.config, encoder), resume)
    directory.sweep(one.name for one in spec.members)
    lay_out(encoder, began)
    publisher = Publisher(crew, root, directory, watcher)
    fleet = Fleet([one.member for one in crew], rows, directory, spec.save_every, publisher.finished)
    fleet.run()
    directory.remove()
    failed = {one.member.name: one.member.failure for one in crew if one.member.failure}
    if failed:
        raise SpecError("; ".join(f"{name} failed at {reason}" for name, reason in failed.items()))
    return publisher.deltas


def _identity(rows: int, encoder: Encoder, crew: list[Enrolled]) -> dict[str, Any]:
    """What a fleet and its continuation must have in common, each member's fields under its name."""
    own = {
        f"{one.member.name}.{key}": value
        for one in crew
        for key, value in identity(one.member.config, encoder, one.member.name, one.data).items()
    }
    return {"deltas": [one.member.name for one in crew], "max_tokens": rows, **own}


class Publisher:
    """Publishes members as they are done, each compared on one fresh encoder for all of them."""

    def __init__(self, crew: list[Enrolled], root: Path, directory: FleetDirectory, watcher: FleetWatcher) -> None:
        self.crew = {one.member.name: one for one in crew}
        self.root, self.directory, self.watcher = root, directory, watcher
        self.fresh: Encoder | None = None
        self.deltas: dict[str, Delta] = {}

    def finished(self, member: Member) -> None:
        """Freezes, measures, saves and compares a member's delta; nothing for one that failed."""
        if member.failure:
            return
        one, out, live = self.crew[member.name], self.root / member.name, member.live
        self.fresh = self.fresh or live.encoder.fresh()
        facts = provenance(member.config, count_parameters(live), member.state, one.data, live.encoder)
        sample = (member.dev, one.data.dev.records) if one.data.dev else (member.items, one.data.train.records)
        log = [self.directory.take_log(member.name)]
        with settled(live, member.dev, member.config.max_tokens, member.config.calibrate) as own:
            metrics = {**member.state.metrics, **own.metrics, **_elsewhere(one)}
            delta = live.freeze(member.name, "", metrics, {**facts, **own.facts})
            difference = publish(delta, live, out, *sample, extra=log, fresh=self.fresh)
        self.deltas[member.name] = replace(delta, version=identify(out).version)
        self.watcher.published(member.name, difference)


def _elsewhere(one: Enrolled) -> dict[str, float]:
    """The metrics on ``ood`` items."""
    if not one.ood:
        return {}
    live = one.member.live
    found = measure(live, task_for(live.task), one.ood, one.member.config.max_tokens)
    return {f"ood_{name}": value for name, value in found.items()}
