"""A grid of training runs, from a small TOML file: methods × values of their fields × tasks × seeds. No torch.

```toml
title = "LoRA's rank on two tasks"
backbone = "roberta-base"
seeds = [0, 1, 2]
statistic = "median"            # or mean
[train]                         # flags of ``train``, with underscores, for every run
epochs = 3
[[tasks]]
name = "MRPC"
task = "classification"
train = "mrpc/train.jsonl.gz"   # below --data, or hub:NAME
eval = "mrpc/dev.jsonl.gz"
metric = "accuracy"
[[methods]]
name = "LoRA"
train = { method = "lora" }
vary = { rank = [1, 8, 64] }
tasks.MRPC = { learning_rate = 4e-4 }
published = { MRPC = 89.7 }
```
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar

from bertology_serve.config_fields import check_fits, check_known
from bertology_serve.data.sets import set_named
from bertology_serve.errors import NotFound, SpecError, nearest
from bertology_serve.files import JsonObject
from bertology_serve.training.config_file import read_settings
from bertology_serve.training.method_options import Values
from bertology_serve.training.train_config import TrainConfig

STATISTICS = ("mean", "median")


@dataclass(frozen=True)
class GridTask:
    """One column: a task, its files, and the metric that is shown.

    ``rows`` and ``eval_rows`` bound what is read of each file, drawn at random (always the same). ``ood`` names files
    of other domains by the name of their columns. ``train`` are flags for its runs. With ``data``, the name of a
    well-known set, what is left out is that set's.
    """

    name: str
    task: str = ""
    train_file: str = ""
    eval_file: str = ""
    metric: str = ""
    data: str = ""
    ood: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    rows: int | None = None
    eval_rows: int | None = None
    train: Values = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.data:
            found = set_named(self.data)
            usual = {
                "task": found.task,
                "train_file": f"set:{found.name}:train",
                "eval_file": f"set:{found.name}:dev",
                "metric": found.metrics[0],
            }
            for name, value in usual.items():
                object.__setattr__(self, name, getattr(self, name) or value)
        for name in ("task", "train_file", "eval_file", "metric"):
            if not getattr(self, name):
                raise SpecError(
                    f"task {self.name!r} has no {name.removesuffix('_file')}; give it, or data = 'glue/mrpc'"
                )


@dataclass(frozen=True)
class GridMethod:
    """One row, or with ``vary`` one for each combination of values. ``tasks`` are flags by task, ``published`` the
    papers' figures by column (percent; ``MRPC``, ``SQuAD → drop``), ``label`` what the papers say of its parameters."""

    name: str
    train: Values = field(default_factory=dict)
    vary: Mapping[str, Sequence[object]] = field(default_factory=dict)
    tasks: Mapping[str, Values] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True)
class GridRun:
    """One cell's run with one seed."""

    task: GridTask
    method: GridMethod
    values: Values
    seed: int
    config: TrainConfig

    @property
    def row(self) -> str:
        """The row's name: ``LoRA, rank 4``."""
        return row_name(self.method.name, self.values)

    @property
    def key(self) -> str:
        """Its directory below the grid's: ``mrpc/lora-rank-4/seed-0``."""
        return f"{slug(self.task.name)}/{slug(self.row)}/seed-{self.seed}"


@dataclass(frozen=True)
class Grid:
    """A whole grid. ``notes`` is printed below its table: where the published figures come from, and what differs."""

    title: str
    backbone: str
    tasks: tuple[GridTask, ...]
    methods: tuple[GridMethod, ...]
    seeds: tuple[int, ...] = (0,)
    statistic: str = "median"
    train: Values = field(default_factory=dict)
    notes: str = ""

    def __post_init__(self) -> None:
        check_known("statistic", self.statistic, STATISTICS)
        for what, entries in (("task", self.tasks), ("method", self.methods)):
            names = [slug(entry.name) for entry in entries]
            if not names or len(set(names)) != len(names):
                raise SpecError(
                    f"a grid needs at least one {what}, each of another name; got {', '.join(names) or 'none'}"
                )
        if not self.seeds:
            raise SpecError("seeds is empty; name at least one")

    def runs(self) -> Iterator[GridRun]:
        """All runs: task by task, seed by seed, so that what is done first makes whole columns. Raises SpecError."""
        for task, seed in itertools.product(self.tasks, self.seeds):
            for method in self.methods:
                for values in combinations(method.vary):
                    yield GridRun(task, method, values, seed, self._config(task, method, values, seed))

    def rows(self) -> list[tuple[str, GridMethod]]:
        """The rows in order: name, and method."""
        return [(row_name(one.name, values), one) for one in self.methods for values in combinations(one.vary)]

    def only(self, tasks: Sequence[str] = (), methods: Sequence[str] = ()) -> Grid:
        """The part of the grid with these tasks and methods; none named: all of them. Raises SpecError."""
        return replace(self, tasks=_chosen(self.tasks, tasks), methods=_chosen(self.methods, methods))

    def _config(self, task: GridTask, method: GridMethod, values: Values, seed: int) -> TrainConfig:
        # as the papers have it: a head begins at random unless the recipe says otherwise
        flags = {
            "task": task.task,
            "start": "random",
            **self.train,
            **task.train,
            **method.train,
            **method.tasks.get(task.name, {}),
        }
        try:
            return read_settings({**flags, **values, "seed": seed})
        except SpecError as problem:
            raise SpecError(f"{row_name(method.name, values)} on {task.name}: {problem}") from None


def read_grid(path: Path) -> Grid:
    """A grid from a TOML file. Raises NotFound, and SpecError naming the file and what is wrong in it."""
    if not path.is_file():
        raise NotFound(f"no grid {path}; give a TOML file, or a name that reproduce --list shows")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        tasks = tuple(_made(GridTask, _task(one), "[[tasks]]") for one in values.pop("tasks", []))
        methods = tuple(_made(GridMethod, one, "[[methods]]") for one in values.pop("methods", []))
        seeds = tuple(values.pop("seeds", (0,)))
        return _made(Grid, {**values, "tasks": tasks, "methods": methods, "seeds": seeds}, "the grid")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise SpecError(f"{path}: not TOML ({problem}); docs/howto/reproduce-a-table.md has a grid's form") from None
    except SpecError as problem:
        raise SpecError(f"{path}: {problem}") from None


def combinations(vary: Mapping[str, Sequence[object]]) -> Iterator[JsonObject]:
    """Every choice of one value a field; one empty choice where nothing varies."""
    for values in itertools.product(*vary.values()):
        yield dict(zip(vary, values, strict=True))


def row_name(method: str, values: Values) -> str:
    """``LoRA, rank 4``."""
    return ", ".join([method, *(f"{name.replace('_', ' ')} {value}" for name, value in values.items())])


def slug(name: str) -> str:
    """A name as a file's: ``adapter-h`` for ``Adapter (H)``."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


Made = TypeVar("Made", GridTask, GridMethod, Grid)
Named = TypeVar("Named", GridTask, GridMethod)


def _task(values: Values) -> JsonObject:
    """In the file ``train`` and ``eval`` are files, and ``flags`` what the class calls ``train``."""
    names = {"train": "train_file", "eval": "eval_file", "flags": "train"}
    return {names.get(name, name): value for name, value in values.items()}


def _made(form: type[Made], values: Values, where: str) -> Made:
    check_fits(f"{where} has no field", values, [one.name for one in fields(form)])
    try:
        return form(**values)
    except TypeError as problem:
        raise SpecError(
            f"{where} lacks a field ({str(problem).partition('missing ')[2]}); see docs/howto/reproduce-a-table.md"
        ) from None


def _chosen(entries: tuple[Named, ...], names: Sequence[str]) -> tuple[Named, ...]:
    known = {slug(one.name): one for one in entries}
    for name in names:
        if slug(name) not in known:
            raise SpecError(f"the grid has no {name!r}; {nearest(slug(name), known)}")
    return tuple(one for one in entries if not names or slug(one.name) in {slug(name) for name in names})


FOLDER = Path(__file__).parent / "presets"


def presets() -> dict[str, Path]:
    """The packaged grids by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def find_grid(name: str) -> Grid:
    """A packaged grid by its name, or any other from its file. Raises NotFound, SpecError."""
    known = presets()
    if name in known:
        return read_grid(known[name])
    if not name.endswith(".toml"):
        raise NotFound(f"no grid {name!r}; {nearest(name, known)} (or a TOML file)")
    return read_grid(Path(name))
