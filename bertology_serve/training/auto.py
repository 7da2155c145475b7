"""``--method auto``: candidates train together as a fleet, and the worse two of three end at every rung.

Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943) on the dev set: at each rung the best third goes on,
until one is left, which makes all steps. Rungs stand at equal distances: at the paper's first, a ninth of the steps,
little of small data has been seen, and all are still about where they began. Each candidate has the schedule of the
whole length, so that the winner is what its settings alone would have given. Where there is no dev set, or a small one,
candidates are judged on held-out folds of the training data, and the winner is trained anew on all of it; its answers
to what was held out calibrate it. ``--folds`` without a search is one candidate.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter

import torch

from bertology_serve.config_fields import join_list
from bertology_serve.data.records import infer_labels
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import DataError, LimitError, SpecError
from bertology_serve.files import JsonObject
from bertology_serve.kinds import kinds
from bertology_serve.tasks.registry import task_for
from bertology_serve.training.baselines import PROBE
from bertology_serve.training.batches import Data, Source
from bertology_serve.training.calibration import Judged, judged_on
from bertology_serve.training.config_file import settings_text
from bertology_serve.training.evaluation import measure
from bertology_serve.training.fleet.fleet import Fleet, Member
from bertology_serve.training.fleet.fleet_directory import FleetDirectory, FleetWatcher, Quiet
from bertology_serve.training.fleet.fleet_run import Enrolled, Shelf, enrolled, rows_of_a_pass
from bertology_serve.training.method_options import AUTO, Values, read_layers
from bertology_serve.training.methods import count_parameters, specs_for
from bertology_serve.training.plots import draw_curves
from bertology_serve.training.run_directory import CONFIG, SKIPPED, Destination, identity
from bertology_serve.training.train import Outcome, for_data, for_encoder, for_rows, lay_out, machine, task_spec
from bertology_serve.training.train_config import START_PROBE, RecipeConfig, TrainConfig, read_budget
from bertology_serve.training.trainer import Callback, Line

BOARD, PLOT = "board.csv", "board.png"
THIRD, MEASURED = 3, 2
"""One in so many goes on at a rung, after so many evaluations."""
FOLDS, SMALL = 3, 100
"""Folds, and the dev rows below which they judge instead."""
STEP = 3.5
"""What a row of a training step takes beside a row that is only answered."""
TIMED = 64

ALL = ("query", "key", "value", "output", "up", "down")
CANDIDATES: Mapping[str, tuple[str, float, Values]] = {
    "lora": ("lora", 1e-3, {}),
    "lora-fast": ("lora", 3e-3, {}),
    "lora-wide": ("lora", 1e-3, {"rank": 16, "targets": ALL}),
    "lora-wide-slow": ("lora", 3e-4, {"rank": 16, "targets": ALL}),
    "lora-thin": ("lora", 2e-3, {"rank": 2, "targets": ALL}),
    "bitfit": ("bitfit", 4e-3, {}),
    "bitfit-fast": ("bitfit", 1e-2, {}),
    "adapter": ("adapter", 2e-3, {}),
    "adapter-slow": ("adapter", 5e-4, {}),
    "prefix": ("prefix", 1e-2, {}),
}
"""Method, learning rate and options of what is tried, the likelier first."""
USUAL = "lora-fast"
"""Begins where training by default does, the others at the probe: a contrastive start is no pass that they share."""
MANY_ROWS = {"prefix": 2000}
"""Training rows from which a method stands a chance."""


def candidates(config: TrainConfig, encoder: Encoder, rows: int) -> dict[str, TrainConfig]:
    """What is tried on that encoder with so many training rows, by name; a learning rate that was given is for all."""
    found: dict[str, TrainConfig] = {}
    read_layers(config.layers, encoder.anatomy.layers)
    for name, (method, rate, options) in CANDIDATES.items():
        own = {method: options} if options else {}
        rate = config.optim.learning_rate or rate
        plan = {"budget": RecipeConfig.budget, "start": config.plan.start or (None if name == USUAL else START_PROBE)}
        try:
            one = config.replaced(method=(method,), options=own, learning_rate=rate, **plan)
            kinds.init(specs_for(one, encoder.anatomy), encoder.anatomy, torch.Generator())
        except SpecError:
            continue  # not on this encoder, or not on these layers
        known = (other.replaced(start=one.plan.start) for other in found.values())
        if rows >= MANY_ROWS.get(method, 0) and one not in known:
            found[name] = one
    return found


def rungs(count: int, unit: int = 1) -> dict[int, int]:
    """After how many steps how many candidates go on, to the end, where none does; ``unit`` lie between evaluations."""
    found: dict[int, int] = {}
    while count:
        count = max(1, count // THIRD) if count > 1 else 0
        found[MEASURED * unit * (len(found) + 1)] = count
    return found


def folds(data: Data, seed: int, count: int | None = None) -> list[Data]:
    """The records that candidates are trained and judged on: the dev set's, or each part of the training data once.

    Raises SpecError for too few records, and where a ``count`` was asked for beside a dev set.
    """
    if count and data.dev is not None:
        raise SpecError("folds take the place of --eval, which was given too; leave one out")
    if data.dev is not None and len(data.dev.records) >= SMALL:
        return [data]
    records, count = data.train.records, count or FOLDS
    if len(records) < 2 * count:
        raise SpecError(f"{count} folds of {len(records)} training records are too few; give more, or an --eval")
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    found = []
    for fold in range(count):
        held = set(order[fold::count])
        parts = [r for i, r in enumerate(records) if i not in held], [records[i] for i in sorted(held)]
        found.append(Data(*(Source(f"{data.train.name}, fold {fold + 1}", part) for part in parts)))
    return found


Row = dict[str, str | int | float]
"""A candidate on the board."""


@dataclass(frozen=True)
class Search:
    """The candidates of a run, each with a member for every fold, the steps between evaluations, and when time is up
    (on the clock of ``perf_counter``).
    """

    crew: Mapping[str, Sequence[Enrolled]]
    unit: int
    directory: FleetDirectory
    ends: float = math.inf

    def late(self) -> bool:
        return perf_counter() >= self.ends

    def losers(self, active: Sequence[Member]) -> Sequence[Member]:
        """The members in training whose candidates are not among the best at this step."""
        keep = rungs(len(self.crew), self.unit).get(active[0].state.step) if active else None
        if not keep:
            return ()
        running = {member.name for member in active}
        whole = [name for name in self.crew if running.issuperset(member.name for member in self.members(name))]
        best = sorted(whole, key=self.rank, reverse=True)[:keep]
        kept = {member.name for name in best for member in self.members(name)}
        return [member for member in active if member.name not in kept]

    def members(self, name: str) -> list[Member]:
        """A candidate's, one a fold."""
        return [one.member for one in self.crew[name]]

    def rank(self, name: str) -> tuple[float, ...]:
        """What candidates are compared by: the best state so far, where that is what is kept, then the latest."""
        members = self.members(name)
        best = [(*member.state.best, -math.inf)[0] for member in members if member.config.eval.keep == "best"]
        latest = fmean(member.latest.get(self.metric, -math.inf) for member in members)
        return fmean(best) if best else latest, latest, -fmean(member.latest.get("loss", 0.0) for member in members)

    @property
    def metric(self) -> str:
        member = next(iter(self.crew.values()))[0].member
        return next(iter(member.latest), member.task.main_metric)

    @property
    def winner(self) -> str:
        """The best of the candidates that made the most steps. Raises SpecError where all failed, or none made a step
        and there is no probe to publish."""
        failures = {name: "".join(member.failure for member in self.members(name)) for name in self.crew}
        steps = {name: self.members(name)[0].state.step for name in self.crew if not failures[name]}
        whole = [name for name, own in steps.items() if own == max(steps.values())]
        if not whole:
            raise SpecError(f"no candidate ended: {'; '.join(f'{k} failed at {v}' for k, v in failures.items())}")
        if self.start is None and not steps[whole[0]]:
            raise SpecError("time was up before the first step; give a larger --budget, or fewer records")
        return max(whole, key=self.rank)

    @property
    def start(self) -> float | None:
        """What the probe has, the mean over the folds; None where training does not begin there."""
        known = [one.start.known.get(PROBE) for one in next(iter(self.crew.values()))]
        return fmean(own[self.metric] for own in known if own) if all(known) else None

    @property
    def improves(self) -> bool:
        return self.start is None or self.rank(self.winner)[0] > self.start

    @property
    def folds(self) -> JsonObject:
        """Mean and standard deviation over the folds of the metrics of what is published."""
        ones = self.crew[self.winner]
        found = [dict(one.member.latest if self.improves else one.start.known[PROBE]) for one in ones]
        each = {name: [own[name] for own in found] for name in found[0] if all(name in own for own in found)}
        return {
            "count": len(ones),
            "mean": {name: fmean(values) for name, values in each.items()},
            "sd": {name: stdev(values) for name, values in each.items()},
        }

    def held_out(self) -> Judged | None:
        """The answers of what is published, trained on the other folds, to each fold's records."""
        ones = self.crew[self.winner]
        own = [one.member.live if self.improves or not one.start.solver else one.start.solver.live for one in ones]
        return judged_on(
            [(live, one.ready.dev) for live, one in zip(own, ones, strict=True)], ones[0].config.machine.max_tokens
        )

    def affordable(self, seconds: float) -> int:
        """The steps of a unit with which the winner's run takes so long, by what its steps took on the folds."""
        members = self.members(self.winner)
        each = sum(member.state.seconds for member in members) / max(1, sum(member.state.step for member in members))
        return 10**9 if seconds == math.inf or not each else int(seconds / each / max(rungs(len(self.crew))))

    def curve(self, name: str) -> dict[int, float]:
        found: dict[int, list[float]] = {}
        for member in self.members(name):
            for line in self.directory.lines_of(member.name):
                if "eval" in line:
                    found.setdefault(line["step"], []).append(line["eval"][self.metric])
        return {step: fmean(values) for step, values in found.items()}

    def board(self) -> list[Row]:
        """A row for each candidate, the best first, and the probe among them where training began there."""
        rows = [self._row(name) for name in self.crew]
        if self.start is not None:
            own: Row = {"candidate": PROBE, "method": PROBE, "steps": 0, self.metric: self.start}
            rows.append({**dict.fromkeys(rows[0], ""), **own})
        return sorted(
            rows, key=lambda row: -math.inf if row[self.metric] == "" else float(row[self.metric]), reverse=True
        )

    def _row(self, name: str) -> Row:
        first, members, curve = self.crew[name][0].config, self.members(name), list(self.curve(name).values())
        kept, steps = max if first.eval.keep == "best" else (lambda values: values[-1]), members[0].state.step
        failure = next((f"failed at {member.failure}" for member in members if member.failure), "")
        return {
            "candidate": name,
            "method": ",".join(first.method),
            "learning_rate": first.rate(first.method[0]),
            "options": " ".join(
                f"{key}={_shown(value)}" for own in first.options.values() for key, value in own.items()
            ),
            "parameters": count_parameters(members[0].live).trained,
            "steps": steps,
            self.metric: kept(curve) if curve else "",
            "seconds": round(sum(member.state.seconds for member in members), 1),
            "end": failure or (("won" if self.improves else "best") if name == self.winner else "dropped"),
        }

    def facts(self, config: TrainConfig, board: Sequence[Row]) -> JsonObject:
        """What the delta says of the search, and why it is the one."""
        folds, row = len(self.crew[self.winner]), next(row for row in board if row["candidate"] == self.winner)
        where = f"on {folds} held-out folds" if folds > 1 else "on the dev set"
        made = "all steps" if row["steps"] == self.members(self.winner)[0].total else f"{row['steps']} steps in time"
        value = f"{row[self.metric]:.4f}" if row[self.metric] != "" else "not measured"
        what = f"{self.metric} {value} {where}, the highest of those that made {made}"
        what += f" (of {len(self.crew)} candidates)"
        if self.start is not None:
            what += f"; the probe, where all began, has {self.start:.4f}" + ("" if self.improves else ": no less")
        what = f"{self.winner} has {what}"
        return {
            "budget": config.plan.budget,
            "first_rung": min(rungs(len(self.crew), self.unit)),
            "folds": folds,
            "why": what,
            "board": list(board),
        }


def _shown(value: object) -> str:
    return join_list(value) if isinstance(value, tuple) else str(value)


def train_auto(
    config: TrainConfig,
    encoder: Encoder,
    train: Source,
    dev: Source | None = None,
    *,
    ood: Source | None = None,
    place: Destination,
    watcher: FleetWatcher | None = None,
    prepack: bool | None = None,
    files: Mapping[str, str] | None = None,
) -> Outcome:
    """Searches, and publishes the winner, or the probe where nothing is better; arguments are those of ``train``.

    ``board.csv`` and, where matplotlib is installed, ``board.png`` lie beside the delta; ``provenance.auto`` says why
    it won. Under a budget in passes a search is the same every time (on a CPU, with the same number of threads); one
    in minutes is turned into passes by a timing at the beginning, and cut where they are over sooner (a continued run
    has them anew). With ``folds`` and another method there is one candidate, and no budget.
    """
    began_at, searches = perf_counter(), AUTO in config.method
    config = for_data(config, train)
    labels = config.form.labels or infer_labels(config.task, train.records)
    config = for_encoder(config.replaced(labels=labels), encoder)
    data, (name, free) = Data(train, dev, ood), place.open()
    directory, watcher, shelf = FleetDirectory(free.out.parent, free.path), watcher or Quiet(), Shelf(encoder)
    single = {"+".join(config.method): for_rows(config, train)}
    tried = candidates(config, encoder, len(train.records)) if searches else single
    parts = folds(data, config.optim.seed, config.eval.folds)
    laid_out = machine(config, encoder, prepack)
    unit = 0 if place.resume and directory.unfinished else unit_of(config, len(tried), parts, shelf, watcher)
    began = directory.open(identity(config, encoder, name, data), {**laid_out, "unit": unit}, place.resume)
    lay_out(encoder, began)
    rows, features = rows_of_a_pass(encoder), directory.path / "features"

    def ready(name: str, config: TrainConfig, part: Data, at: FleetDirectory) -> Enrolled:
        one = enrolled(name, config.replaced(folds=None), part, shelf, at, watcher)
        one.begin(shelf.start(one.plan, one.ready, features))
        return one

    unit, keep, before = began["unit"], "best" if len(parts) == 1 else "last", perf_counter()
    try:
        crew = {
            name: [
                ready(
                    f"{name}-{number}" if len(parts) > 1 else name,
                    scheduled(own, unit, len(tried), part, keep),
                    part,
                    directory,
                )
                for number, part in enumerate(parts, 1)
            ]
            for name, own in tried.items()
        }
    except (DataError, SpecError, LimitError):  # nothing was trained that could be continued
        if not place.resume:
            directory.remove()
        raise
    amount, timed = read_budget(config.plan.budget)
    seconds = amount if timed and searches else math.inf
    ends, last = began_at + seconds, 0.0
    if len(parts) > 1 and ends < math.inf:  # the winner's run on all records, which begins as those of the folds did
        last = seconds * 2 * max(rungs(len(tried))) / spent(len(tried), parts)
        last += (perf_counter() - before) * len(train.records) / sum(len(part.train.records) for part in parts)
    search = Search(crew, unit, directory, ends - last)
    members = [one.member for ones in crew.values() for one in ones]
    Fleet(members, rows, directory, config.eval.save_every, losers=search.losers, late=search.late).run()
    one, log, judged = crew[search.winner][0], directory, None
    facts: JsonObject = {}
    if len(parts) > 1:  # once more, on all of the training data
        facts["folds"], judged = search.folds, search.held_out()
        log = FleetDirectory(directory.root, directory.path / "winner")
        log.path.mkdir(exist_ok=True)
        longer = round(unit * len(train.records) / len(parts[0].train.records))
        longer = max(1, min(longer, search.affordable(ends - perf_counter())))
        one = ready(search.winner, scheduled(tried[search.winner], longer, len(tried), data, "best"), data, log)
        one.beaten = not search.improves
        if not one.beaten:
            Fleet([one.member], rows, log, config.eval.save_every, late=lambda: perf_counter() >= ends).run()
    board = search.board()
    write_board(directory.path, board, search)
    directory.write_config(settings_text(one.config, files or data.names(encoder.name), began["prepacked"]))
    directory.write_skipped(data.skipped)
    extra = [log.take_log(one.member.name), *(directory.path / name for name in (CONFIG, BOARD, PLOT, SKIPPED))]
    facts |= {"auto": search.facts(config, board)} if searches else {}
    outcome = one.publish(name, free.out, extra, place.version or "", facts, judged=judged)
    directory.remove()
    return outcome


def scheduled(config: TrainConfig, unit: int, count: int, part: Data, keep: str) -> TrainConfig:
    """The settings of a run of its own: as many steps as the winner of ``count`` makes, measured after every unit."""
    steps = max(rungs(count, unit))
    epochs = math.ceil(steps / math.ceil(len(part.train.records) / config.optim.batch_size))
    own: JsonObject = {"max_steps": steps, "eval_every": unit, "epochs": epochs, "patience": None, "keep": keep}
    return config.replaced(**own)


def spent(count: int, parts: Sequence[Data]) -> int:
    """What a search makes in all, in units: steps between evaluations, and one of the latter."""
    steps, training = max(rungs(count)), [count, *rungs(count).values()]
    return MEASURED * sum(training) * len(parts) + (2 * steps if len(parts) > 1 else 0)  # and the winner once more


def unit_of(config: TrainConfig, count: int, parts: Sequence[Data], shelf: Shelf, watcher: FleetWatcher) -> int:
    """The steps between evaluations: what the budget buys, and no more than give the winner its epochs.

    ``watcher`` is told where the budget is less than the least that there is to do.
    """
    rows, dev = len(parts[0].train.records), len(parts[0].dev.records) if parts[0].dev else 0
    size, longest = config.optim.batch_size, config.optim.max_steps
    full = config.passes(rows) * math.ceil(rows / size)
    whole = math.ceil(min(full, longest or full) / max(rungs(count)))
    if AUTO not in config.method:
        return whole
    amount, timed = read_budget(config.plan.budget)
    units = spent(count, parts)
    texts = amount / units * rows
    if timed:
        second = 1 / _seconds_a_row(config, parts[0], shelf)
        least = units * (dev + STEP * size) / second
        texts = (amount / units * second - dev) / STEP
        if least > amount:
            watcher.noted(
                f"the least that this search has to do takes about {least:.0f} s: it is cut when --budget "
                f"({config.plan.budget}) is over; fewer --eval records take less"
            )
    return max(1, min(int(texts / size), whole))


def _seconds_a_row(config: TrainConfig, part: Data, shelf: Shelf) -> float:
    """What an answer takes, timed on some training rows."""
    spec = task_spec(config, shelf.encoder, part.train)
    items = shelf.made(part.train, spec)
    sample = items[:: max(1, len(items) // TIMED)][:TIMED]
    live, rounds, began = TrainableDelta(shelf.encoder, (), spec), 4, 0.0
    for number in range(rounds):
        began = began if number > 1 else perf_counter()  # the first round warms up
        measure(live, task_for(spec), sample, config.machine.max_tokens)
    return (perf_counter() - began) / (rounds - 1) / len(sample)


def write_board(folder: Path, board: Sequence[Row], search: Search) -> None:
    """The board as CSV and, where matplotlib is installed, every candidate's curve."""
    with (folder / BOARD).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(board[0]))
        writer.writeheader()
        writer.writerows(board)
    if find_spec("matplotlib") is not None:
        draw_curves(folder / PLOT, search.metric, {name: search.curve(name) for name in search.crew}, search.start)


class Forwarded(Quiet):
    """Tells the watcher of a single run of every candidate, whose lines have ``candidate``."""

    def __init__(self, callback: Callback) -> None:
        self.callback = callback

    def stepped(self, name: str, line: Line) -> None:
        self.callback.stepped({**line, "candidate": name})

    def evaluated(self, name: str, line: Line) -> None:
        self.callback.evaluated({**line, "candidate": name})
