"""What a grid's runs gave, as tables: Markdown in the papers' shape, and CSV. Imports no torch."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from bertology_serve.training.grids.grid import Grid, GridMethod, GridRun

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of figures: a task's own data, or with ``ood`` another domain's."""

    task: str
    metric: str
    ood: str = ""

    @property
    def title(self) -> str:
        """``SST-2``, or ``SST-2 → yelp``."""
        return f"{self.task} → {self.ood}" if self.ood else self.task


@dataclass(frozen=True)
class Cell:
    """The figures of one row and column by seed, in percent, and how many seeds there should be."""

    values: tuple[float, ...]
    seeds: int
    statistic: str

    @property
    def middle(self) -> float | None:
        if not self.values:
            return None
        return (statistics.median if self.statistic == "median" else statistics.fmean)(self.values)

    @property
    def spread(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """``81.5 ± 0.4``; with fewer seeds than there should be, how many; – where there are none."""
        if self.middle is None:
            return "–"
        spread = "" if self.spread is None else f" ± {self.spread:.1f}"
        few = f" ({len(self.values)} of {self.seeds} seeds)" if len(self.values) < self.seeds else ""
        return f"{self.middle:.1f}{spread}{few}"


class Results:
    """The runs of a grid that are finished, and the cells that they make."""

    def __init__(self, grid: Grid, found: Iterable[tuple[GridRun, Result]]) -> None:
        self.grid = grid
        self.found = list(found)
        self.rows: list[tuple[str, GridMethod]] = grid.rows()
        self.columns = [Column(task.name, task.metric, ood) for task in grid.tasks for ood in ("", *task.ood)]

    def of(self, row: str, task: str | None = None) -> list[Result]:
        """The results of a row, of all tasks or of one, seed by seed."""
        return [result for run, result in self.found if run.row == row and task in (None, run.task.name)]

    def cell(self, row: str, column: Column) -> Cell:
        values = [100 * one["measured"][column.ood][column.metric] for one in self.of(row, column.task)]
        return Cell(tuple(values), len(self.grid.seeds), self.grid.statistic)

    def filled(self) -> list[Column]:
        return [one for one in self.columns if any(self.cell(name, one).values for name, _ in self.rows)]

    def average(self, row: str) -> float | None:
        """The mean over the tasks' own columns, where each has a figure from every seed."""
        cells = [self.cell(row, column) for column in self.columns if not column.ood]
        whole = all(len(cell.values) == cell.seeds for cell in cells)
        return statistics.fmean(cell.middle or 0.0 for cell in cells) if whole else None

    def whole_tasks(self) -> list[str]:
        return [task.name for task in self.grid.tasks if not self.missing(task.name)]

    def missing(self, task: str) -> int:
        there = sum(run.task.name == task for run, _ in self.found)
        return len(self.rows) * len(self.grid.seeds) - there

    def median(self, row: str, fact: str, tasks: Sequence[str]) -> float | None:
        """The median of what a row's runs on some tasks cost."""
        values = [one[fact] for task in tasks for one in self.of(row, task) if one.get(fact) is not None]
        return statistics.median(values) if values else None


MIB = 1024 * 1024


def markdown(results: Results) -> str:
    """The whole document: figures, costs, what is missing, notes and machines."""
    parts = [f"# {results.grid.title}", figures(results), _legend(results), costs(results), _missing(results)]
    return "\n\n".join([*(part for part in parts if part), results.grid.notes.strip(), _facts(results)]).strip() + "\n"


def figures(results: Results) -> str:
    """A row a method, a column a task that has begun; a published figure stands in brackets."""
    titles = ["method", "parameters", *(column.title for column in _shown(results)), "mean"]
    return _table(titles, [[name, *_figures(results, name, method)] for name, method in results.rows])


def costs(results: Results) -> str:
    """What a run costs: medians over the tasks whose every run is finished, or over all where none is."""
    tasks = results.whole_tasks() or list(dict.fromkeys(column.task for column in _shown(results)))
    titles = ["method", "s a run", "tokens/s", "peak memory, MiB", "optimizer, MiB"]
    rows = []
    for name, _ in results.rows:
        facts = [
            results.median(name, fact, tasks)
            for fact in ("seconds", "tokens_per_second", "peak_bytes", "optimizer_bytes")
        ]
        scales, digits = (1, 1, MIB, MIB), (0, 0, 0, 2)
        cells = [_number(value, scale, places) for value, scale, places in zip(facts, scales, digits, strict=True)]
        rows.append([name, *cells])
    return f"Medians over the runs on {', '.join(tasks)}; memory is the whole process's.\n\n" + _table(titles, rows)


def wide_csv(results: Results) -> str:
    """The figures as a table: for every column the statistic, the deviation, the seeds and the published figure."""
    kinds = (results.grid.statistic, "std", "seeds", "published")
    header = ["method", "parameters", *(f"{column.title} {kind}" for column in results.columns for kind in kinds)]
    rows = []
    for name, method in results.rows:
        row: list[object] = [name, parameters(results, name)]
        for column in results.columns:
            cell, known = results.cell(name, column), method.published.get(column.title)
            row += [_rounded(cell.middle), _rounded(cell.spread), len(cell.values), known]
        rows.append(row)
    return _csv(header, rows)


def long_csv(results: Results) -> str:
    """A line a figure: task, other domain, metric, method, what varied, seed, value, and what the run cost."""
    axes = sorted({axis for _, method in results.rows for axis in method.vary})
    facts = ("trained_parameters", "delta_parameters", "seconds", "tokens_per_second", "peak_bytes", "optimizer_bytes")
    rows = []
    for run, result in results.found:
        for ood, measured in result["measured"].items():
            for metric, value in measured.items():
                named = [
                    run.task.name,
                    ood,
                    metric,
                    run.method.name,
                    *(run.values.get(axis) for axis in axes),
                    run.seed,
                ]
                rows.append([*named, value, *(result[fact] for fact in facts)])
    return _csv(["task", "ood", "metric", "method", *axes, "seed", "value", *facts], rows)


def parameters(results: Results, row: str) -> int | None:
    """Trained parameters without the head, which depends on the task."""
    found = results.of(row)
    return int(found[0]["delta_parameters"]) if found else None


def _figures(results: Results, name: str, method: GridMethod) -> Iterator[str]:
    count = parameters(results, name)
    yield (f"{count:,}" if count is not None else "–") + (f" ({method.label})" if method.label else "")
    for column in _shown(results):
        known = method.published.get(column.title)
        yield results.cell(name, column).text + (f" ({known:.1f})" if known is not None else "")
    average = results.average(name)
    known = _published_mean(results, method)
    yield ("–" if average is None else f"{average:.1f}") + (f" ({known:.1f})" if known is not None else "")


def _published_mean(results: Results, method: GridMethod) -> float | None:
    """Of the published figures, where there is one for every task."""
    known = [method.published[task.name] for task in results.grid.tasks if task.name in method.published]
    return sum(known) / len(known) if len(known) == len(results.grid.tasks) else None


def _shown(results: Results) -> list[Column]:
    """The columns of the Markdown table: those with a figure; all, where none has one."""
    return results.filled() or results.columns


def _legend(results: Results) -> str:
    count = len(results.grid.seeds)
    metrics = ", ".join(f"{column.title} {column.metric}" for column in _shown(results) if not column.ood)
    spread = " ± standard deviation" if count > 1 else ""
    brackets = " In brackets: published." if any(method.published for _, method in results.rows) else ""
    middle = f"{results.grid.statistic.capitalize()}{spread} of {count} {'seeds' if count > 1 else 'seed'}"
    return f"{middle}, in percent: {metrics}. Parameters are those trained, without the head.{brackets}"


def _missing(results: Results) -> str:
    lacking = [(task.name, results.missing(task.name)) for task in results.grid.tasks]
    named = [f"{name} {count} of {len(results.rows) * len(results.grid.seeds)}" for name, count in lacking if count]
    return f"Runs that are missing: {', '.join(named)}." if named else ""


def _facts(results: Results) -> str:
    sizes = {}
    for run, result in results.found:
        measured = ", ".join(f"{name or 'own'} {rows:,}" for name, rows in result["measured_rows"].items())
        sizes[run.task.name] = f"{run.task.name} {result['rows']:,} (measured on: {measured})"
    machines = sorted({f"{one['hardware']}; {one['versions']}; {one['date']}" for _, one in results.found})
    return f"Training rows: {'; '.join(sizes.values()) or 'none yet'}. {' · '.join(machines)}".strip()


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, scale: float, places: int) -> str:
    return "–" if value is None else f"{value / scale:,.{places}f}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    file = StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()
