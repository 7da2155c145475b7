"""Trains a fleet from its records to published directories, in the order in which it happens."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bertology_serve.deltas.catalog import identify
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import SpecError
from bertology_serve.files import JsonObject
from bertology_serve.tasks.base import Item, make_items
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.training.baselines import PROBE, baselines
from bertology_serve.training.batches import Data, Source, shaped
from bertology_serve.training.calibration import Judged
from bertology_serve.training.fleet.fleet import Fleet, Member, check_frozen
from bertology_serve.training.fleet.fleet_directory import FleetDirectory, FleetWatcher, Quiet
from bertology_serve.training.fleet.fleet_spec import FleetSpec
from bertology_serve.training.methods import begin_at_probe, count_parameters, make_live, start_at_data
from bertology_serve.training.probe_solver import Solver
from bertology_serve.training.publish import publish
from bertology_serve.training.recipes import Stage, stages
from bertology_serve.training.run_directory import Follower, identity
from bertology_serve.training.train import (
    Outcome,
    Prepared,
    finished,
    first_of,
    for_data,
    for_encoder,
    for_rows,
    lay_out,
    machine,
    task_spec,
    usable,
)
from bertology_serve.training.train_config import TrainConfig

# Rows of one pass where none were asked for. On a CPU more no longer fit its caches; a GPU wants to be full.
ROWS = {"cpu": 512}
ROWS_ELSEWHERE = 8192

Columns = tuple[tuple[str, str], ...]


def rows_of_a_pass(encoder: Encoder) -> int:
    """The default for where the encoder is."""
    return ROWS.get(encoder.device.type, ROWS_ELSEWHERE)


@dataclass(frozen=True)
class Start:
    """What a member has to beat: dev metrics by name, and the solved probe that it begins at, where it does."""

    known: Mapping[str, Mapping[str, float]]
    solver: Solver | None = None


@dataclass
class Shelf:
    """Records, tokenised items and solved probes, each made once however many members want them."""

    encoder: Encoder
    sources: dict[tuple[str, Columns], Source] = field(default_factory=dict)
    items: dict[tuple[int, TaskSpec], list[Item]] = field(default_factory=dict)
    starts: dict[tuple[object, ...], Start] = field(default_factory=dict)

    def source(self, path: str, columns: Mapping[str, str]) -> Source:
        key = path, tuple(sorted(columns.items()))
        if key not in self.sources:
            self.sources[key] = Source.read(path, columns)
        return self.sources[key]

    def made(self, source: Source | None, spec: TaskSpec) -> list[Item]:
        if source is None:
            return []
        key = id(source), spec
        if key not in self.items:
            self.items[key] = make_items(task_for(spec), source.records, self.encoder.tokenizer)
        return self.items[key]

    def start(self, plan: Sequence[Stage], ready: Prepared, folder: Path) -> Start:
        """What training by ``plan`` begins with; features lie in ``folder`` meanwhile."""
        first = plan[0].config if len(plan) > 1 else None
        solving = first and (first.plan.lp_path, first.optim.seed, first.machine.max_tokens)
        key = id(ready.items), id(ready.dev), ready.task.spec, solving
        if key not in self.starts:
            own = ready.task, ready.items
            known = baselines(self.encoder, *own, ready.dev) if ready.dev else {}
            solver = None
            if first is not None:
                live = make_live(self.encoder, first, ready.task.spec)
                solver = Solver(live, *own, first, ready.dev, Follower(folder), folder=folder)
                found = solver.run()
                known |= {PROBE: found.metrics} if ready.dev else {}
            self.starts[key] = Start(known, solver)
        return self.starts[key]


@dataclass
class Enrolled:
    """A member with what the beginning and the end of its training need; ``config`` is as it was asked for.

    ``beaten``: the probe is known to be better, whatever its own dev set says.
    """

    member: Member
    config: TrainConfig
    plan: Sequence[Stage]
    ready: Prepared
    data: Data
    start: Start = field(default_factory=lambda: Start({}))
    beaten: bool = False

    def begin(self, start: Start) -> None:
        """Puts the head where the probe has it."""
        self.start = start
        if start.solver is not None:
            begin_at_probe(self.member.live, start.solver.live.head.own_tensors())
            self.member.begin_at(start.solver.state.metrics, first_of(self.plan[-1], self.member.live, self.ready))
            self.member.state.seconds = start.solver.state.seconds

    @property
    def unimproved(self) -> bool:
        return self.start.solver is not None and (self.beaten or self.member.unimproved)

    def publish(
        self,
        name: str,
        out: Path,
        extra: Sequence[Path],
        version: str = "",
        facts: Mapping[str, object] | None = None,
        fresh: Encoder | None = None,
        judged: Judged | None = None,
    ) -> Outcome:
        """Freezes, measures, saves and compares what training ended with, or the probe that it is not better than.

        ``facts`` are for the delta's provenance; ``judged`` calibrates it where there is no dev set; see ``publish`` of
        ``training.publish`` for ``extra`` and ``fresh``.
        """
        live, state, config, known = self.member.live, self.member.state, self.config, dict(self.start.known)
        probe = self.start.solver.answers() if self.start.solver is not None and self.ready.dev else ()
        if self.start.solver is not None and self.unimproved:
            live, state, config = self.start.solver.live, self.start.solver.state, self.start.solver.config
            known.pop(PROBE, None)
            probe = ()
        delta = finished(live, self.ready, state, config, self.data, known, name, version, probe=probe, judged=judged)
        delta = replace(delta, provenance={**delta.provenance, **(facts or {})})
        difference = publish(delta, live, out, *self.ready.sample(self.data), extra=extra, fresh=fresh)
        delta = replace(delta, version=identify(out).version)
        return Outcome(delta, out, count_parameters(live), state, difference, 0, known, self.unimproved)


def enrol(
    spec: FleetSpec, shelf: Shelf, directory: FleetDirectory | None = None, watcher: FleetWatcher | None = None
) -> list[Enrolled]:
    """Reads and checks all data and makes every member. Raises DataError and SpecError naming the delta."""
    crew = []
    for one in spec.members:
        train, dev, ood = (shelf.source(path, one.columns) if path else None for path in (one.train, one.eval, one.ood))
        assert train is not None
        data = usable(one.config, Data(train, dev, ood))
        crew.append(enrolled(one.name, one.config, data, shelf, directory, watcher))
    return crew


def enrolled(
    name: str,
    config: TrainConfig,
    data: Data,
    shelf: Shelf,
    directory: FleetDirectory | None = None,
    watcher: FleetWatcher | None = None,
) -> Enrolled:
    """One member, its head at random numbers yet."""
    check_frozen(name, config)
    config = for_rows(for_encoder(for_data(config, data.train), shelf.encoder), data.train)
    plan = stages(config)
    own, spec = plan[-1].config, task_spec(config, shelf.encoder, data.train)
    live, task = make_live(shelf.encoder, own, spec), task_for(spec)
    ready = Prepared(live, task, *(shelf.made(source, spec) for source in (data.train, data.dev, data.ood)))
    start_at_data(live, ready.items)
    ready = replace(ready, items=shaped(task, ready.items, config, shelf.encoder.tokenizer))
    member = Member(name, live, task, ready.items, own, ready.dev, directory, watcher)
    return Enrolled(member, config, plan, ready, data)


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
    shelf = Shelf(encoder)
    crew = enrol(spec, shelf, directory, watcher)
    rows = spec.max_tokens or rows_of_a_pass(encoder)
    began = directory.open(_identity(rows, encoder, crew), machine(crew[0].member.config, encoder), resume)
    directory.sweep(one.name for one in spec.members)
    lay_out(encoder, began)
    for one in crew:
        one.begin(shelf.start(one.plan, one.ready, directory.path / "features"))
    publisher = Publisher(crew, root, directory, watcher)
    fleet = Fleet([one.member for one in crew], rows, directory, spec.save_every, publisher.finished)
    fleet.run()
    directory.remove()
    failed = {one.member.name: one.member.failure for one in crew if one.member.failure}
    if failed:
        raise SpecError("; ".join(f"{name} failed at {reason}" for name, reason in failed.items()))
    return publisher.deltas


def _identity(rows: int, encoder: Encoder, crew: list[Enrolled]) -> JsonObject:
    """What a fleet and its continuation must have in common, each member's fields under its name."""
    own = {
        f"{one.member.name}.{key}": value
        for one in crew
        for key, value in identity(one.config, encoder, one.member.name, one.data).items()
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
        """Publishes a member's delta; nothing for one that failed."""
        if member.failure:
            return
        self.fresh = self.fresh or member.live.encoder.fresh()
        log = [self.directory.take_log(member.name)]
        made = self.crew[member.name].publish(member.name, self.root / member.name, log, fresh=self.fresh)
        self.deltas[member.name] = made.delta
        self.watcher.published(member.name, made.difference)
