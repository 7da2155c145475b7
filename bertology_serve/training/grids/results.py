"""What a grid's runs gave, as cells of its table. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
        """Their mean or median."""
        if not self.values:
            return None
        return (statistics.median if self.statistic == "median" else statistics.fmean)(self.values)

    @property
    def spread(self) -> float | None:
        """Their standard deviation (of a sample)."""
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
        """The figures of one cell."""
        values = [100 * one["measured"][column.ood][column.metric] for one in self.of(row, column.task)]
        return Cell(tuple(values), len(self.grid.seeds), self.grid.statistic)

    def filled(self) -> list[Column]:
        """The columns that hold a figure."""
        return [one for one in self.columns if any(self.cell(name, one).values for name, _ in self.rows)]

    def average(self, row: str) -> float | None:
        """The mean over the tasks' own columns, where each has a figure from every seed."""
        cells = [self.cell(row, column) for column in self.columns if not column.ood]
        whole = all(len(cell.values) == cell.seeds for cell in cells)
        return statistics.fmean(cell.middle or 0.0 for cell in cells) if whole else None

    def whole_tasks(self) -> list[str]:
        """The tasks whose every run is finished."""
        return [task.name for task in self.grid.tasks if not self.missing(task.name)]

    def missing(self, task: str) -> int:
        """How many of a task's runs are not finished."""
        there = sum(run.task.name == task for run, _ in self.found)
        return len(self.rows) * len(self.grid.seeds) - there

    def median(self, row: str, fact: str, tasks: Sequence[str]) -> float | None:
        """The median of what a row's runs on some tasks cost."""
        values = [one[fact] for task in tasks for one in self.of(row, task) if one.get(fact) is not None]
        return statistics.median(values) if values else None
