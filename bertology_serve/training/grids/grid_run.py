"""Runs of a grid, each trained, measured as a server would answer and remembered in one small file; and their report.

``OUT/runs/KEY/`` holds ``spec.json`` (what the run is), while it is under way the unfinished delta, and at the end
``result.json``, which is written whole or not at all, and ``log.jsonl``. The delta itself is kept only when asked.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

import bertology_serve
from bertology_serve.data.formats import SET_PREFIX
from bertology_serve.data.records import Record
from bertology_serve.data.set_files import parse
from bertology_serve.data.sets import official_metrics, set_named
from bertology_serve.deltas import store
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import BertologyError, InputError, nearest
from bertology_serve.files import JsonObject, replacing, write_json
from bertology_serve.training import plots
from bertology_serve.training.batches import Source
from bertology_serve.training.evaluation import evaluate
from bertology_serve.training.grids.grid import Grid, GridRun, GridTask
from bertology_serve.training.grids.grid_tables import Results, long_csv, markdown, wide_csv
from bertology_serve.training.memory import Peak
from bertology_serve.training.run_directory import LOG, Destination
from bertology_serve.training.train import Outcome, train
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import Line

Measured = dict[str, dict[str, float]]

RESULT, SPEC, DELTA, TRAIN = "result.json", "spec.json", "delta", "train"


@dataclass(frozen=True)
class GridPlace:
    """Where a grid runs: its directory, where its data lies, and what computes."""

    out: Path
    data: Path
    backbone: str
    device: str = "cpu"
    keep: bool = False

    def directory(self, run: GridRun) -> Path:
        return self.out / "runs" / run.key

    def find(self, file: str) -> str:
        """A grid's file below ``data``; a known set there or, where it is not, wherever it is looked for."""
        if not file.startswith(SET_PREFIX):
            return file if file.startswith("hub:") else str(self.data / file)
        name, split = parse(file)
        folders = (self.data / name, self.data / name.rpartition("/")[2])
        return next((f"{SET_PREFIX}{name}@{folder}:{split}" for folder in folders if folder.is_dir()), file)


def result_of(run: GridRun, place: GridPlace) -> JsonObject | None:
    """What the run gave, if it is finished and still the one that the grid names, on the data that is there."""
    path = place.directory(run) / RESULT
    if not path.exists() or not _is_same(run, place):
        return None
    found: JsonObject = json.loads(path.read_text(encoding="utf-8"))
    known, now = found.get("data", {}), _data_of(run, place)
    return None if any(known[role] != now[role] for role in known.keys() & now.keys()) else found


def execute(run: GridRun, place: GridPlace) -> JsonObject:
    """Makes one run, or continues it where it was killed; returns and leaves its result.

    Raises InputError where the task does not have the metric that the grid names.
    """
    directory = place.directory(run)
    if not _is_same(run, place):
        shutil.rmtree(directory, ignore_errors=True)  # of a grid that has changed since
        directory.mkdir(parents=True)
        write_json(directory / SPEC, _spec(run, place))
    others = {name: _source(run.task, file, rows, place) for name, (file, rows) in _files(run.task).items()}
    source = others.pop(TRAIN)
    encoder = Encoder.load(place.backbone, device=place.device)
    peak = Peak(encoder.device)
    dev = others[""] if run.config.eval.keep == "best" else None
    where = Destination(directory / DELTA, name="delta", resume=True, overwrite=True)
    outcome = train(run.config, encoder, source, dev, place=where)
    result = {**_facts(outcome, peak, encoder), "rows": len(source.records), "data": _data_of(run, place)}
    result["measured"] = measured = _measured(outcome, others, place, run.task.data)
    if run.task.metric not in measured[""]:
        raise InputError(f"{run.task.name} has no metric {run.task.metric!r}; {nearest(run.task.metric, measured[''])}")
    result["measured_rows"] = {name: len(other.records) for name, other in others.items()}
    shutil.copy(outcome.path / LOG, directory / LOG)
    write_json(directory / RESULT, result)
    if not place.keep:
        for product in directory.glob(f"{DELTA}*"):
            shutil.rmtree(product)
        shutil.rmtree(directory / ".features", ignore_errors=True)
    return result


def _measured(outcome: Outcome, others: Mapping[str, Source], place: GridPlace, known: str) -> Measured:
    """Metrics of the published delta by column, the task's own called ``""``; the official ones of a ``known`` set."""
    delta = store.load(outcome.path)
    encoder = Encoder.for_delta(delta, place.backbone, device=place.device)
    found = {name: evaluate(delta, other.records, encoder) for name, other in others.items()}
    if not known:
        return {name: one.metrics for name, one in found.items()}
    return {
        name: one.metrics | official_metrics(set_named(known), one.metrics, one.answers, others[name].records)
        for name, one in found.items()
    }


def _facts(outcome: Outcome, peak: Peak, encoder: Encoder) -> JsonObject:
    text = (outcome.path / LOG).read_text(encoding="utf-8")
    steps = [line for line in map(json.loads, text.splitlines()) if "tokens" in line]
    tokens, seconds = (sum(values) for values in zip(*map(_work, steps), strict=True)) if steps else (0, 0.0)
    return {
        "trained_parameters": outcome.parameters.trained,
        "delta_parameters": outcome.parameters.delta,
        "seconds": round(outcome.state.seconds, 1),
        "steps": len(steps),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "peak_bytes": peak.bytes(),
        "optimizer_bytes": outcome.optimizer_bytes,
        "hardware": outcome.delta.provenance["hardware"],
        "weights": encoder.ref.sha256[:12],
        "versions": f"bertology-serve {bertology_serve.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "date": datetime.now(UTC).date().isoformat(),
    }


def _work(line: Line) -> tuple[int, float]:
    return line["tokens"], line["tokens"] / line["tokens_per_s"]


def _files(task: GridTask) -> dict[str, tuple[str, int | None]]:
    """The files of a task and how many rows of each, by what they are for: to learn from, or by the metrics' column."""
    measured = {"": task.eval_file, **task.ood}
    return {TRAIN: (task.train_file, task.rows), **{name: (file, task.eval_rows) for name, file in measured.items()}}


def _data_of(run: GridRun, place: GridPlace) -> JsonObject:
    """What the files hold now, in a word for each; one that cannot be read now is left out."""
    found: JsonObject = {}
    for role, (file, rows) in _files(run.task).items():
        with suppress(BertologyError):
            found[role] = _source(run.task, file, rows, place).fingerprint
    return found


def _source(task: GridTask, file: str, rows: int | None, place: GridPlace) -> Source:
    """A file's records; ``rows`` of them, drawn by a seed that is always the same, in their order."""
    source = Source.read(place.find(file), task.columns)
    if rows is None or rows >= len(source.records):
        return source
    chosen: list[Record] = [
        source.records[i] for i in sorted(random.Random(0).sample(range(len(source.records)), rows))
    ]
    return Source(source.name, chosen, source.columns)


def _spec(run: GridRun, place: GridPlace) -> JsonObject:
    """All that a run's figures depend on, as JSON gives it back."""
    task = {name: value for name, value in asdict(run.task).items() if name not in ("name", "metric", "train", "data")}
    task |= {"data": run.task.data} if run.task.data else {}
    spec = {"backbone": place.backbone, "task": task, "training": run.config.as_dict()}
    plain: JsonObject = json.loads(json.dumps(spec))
    return plain


def _is_same(run: GridRun, place: GridPlace) -> bool:
    """Whether what lies there is this run; fields that are newer than it had their defaults."""
    try:
        stored = json.loads((place.directory(run) / SPEC).read_text(encoding="utf-8"))
        stored["training"] = TrainConfig.of(**stored["training"]).as_dict()
    except (OSError, ValueError, TypeError, KeyError, InputError):
        return False
    return bool(json.loads(json.dumps(stored)) == _spec(run, place))


TABLE, WIDE, LONG = "table.md", "table.csv", "runs.csv"


def collect(grid: Grid, place: GridPlace) -> Results:
    """The finished runs of a grid."""
    return Results(grid, [(run, found) for run in grid.runs() if (found := result_of(run, place)) is not None])


def write_report(grid: Grid, place: GridPlace, draw: bool = True) -> Results:
    """Writes the tables and, with ``draw`` and where matplotlib is, the plots, of whatever is finished."""
    results = collect(grid, place)
    place.out.mkdir(parents=True, exist_ok=True)
    for name, text in ((TABLE, markdown(results)), (WIDE, wide_csv(results)), (LONG, long_csv(results))):
        with replacing(place.out / name) as own:
            own.write_text(text, encoding="utf-8")
    if draw and results.found and plots.can_plot():
        logs: dict[tuple[str, str], list[Path]] = {}
        for run, _ in results.found:
            logs.setdefault((run.row, run.task.name), []).append(place.directory(run) / LOG)
        plots.draw_axes(results, place.out)
        plots.draw_parameters(results, place.out)
        plots.draw_gradients(results, logs, place.out)
    return results
