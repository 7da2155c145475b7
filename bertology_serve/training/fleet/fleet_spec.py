"""A fleet as a TOML file: what its deltas have in common, and each delta by name. Imports no torch.

::

    backbone = "minilm"

    [all]                                # fields of every delta
    task = "classification"
    train = "train.jsonl"                # relative to this file
    eval = "dev.jsonl"

    [delta.mood]                         # becomes OUT/mood
    method = "lora"
    rank = 4

    [delta.tone]                         # becomes OUT/tone-0, OUT/tone-1, OUT/tone-2
    method = "bitfit"
    grid.seed = [0, 1, 2]

Fields are those of ``train``'s configuration, the options of its kinds (``rank``, ``biases``, ...), and ``train``,
``eval``, ``ood`` and ``columns``. A ``grid`` gives fields lists of values; each combination is a delta.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from bertology_serve.config_fields import check_fits
from bertology_serve.deltas.catalog import check_name
from bertology_serve.errors import BertologyError, DataError, InputError, NotFound, SpecError
from bertology_serve.training.config_file import KINDS, OWN, read_settings
from bertology_serve.training.method_options import KindFlags, Values
from bertology_serve.training.train_config import TrainConfig

SOURCES = ("train", "eval", "ood", "columns")
_TOP = ("backbone", "max_tokens", "save_every", "all", "delta")


@dataclass(frozen=True)
class MemberSpec:
    """One delta of a fleet. ``columns`` maps fields of records to columns of the files."""

    name: str
    config: TrainConfig
    train: str
    eval: str | None = None
    ood: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FleetSpec:
    """The deltas, their encoder, the rows of one pass (``None``: see ``run``), and the steps between checkpoints."""

    members: tuple[MemberSpec, ...]
    backbone: str | None = None
    max_tokens: int | None = None
    save_every: int = 200


def read_fleet(path: Path) -> FleetSpec:
    """The fleet of a file. Raises NotFound, DataError for what is no TOML, SpecError naming the delta and field."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"no file {path}; expected a fleet in TOML") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no TOML: {error}") from None
    try:
        return fleet_from_dict(values, path.parent)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def fleet_from_dict(values: Values, root: Path = Path()) -> FleetSpec:
    """The fleet that a table holds; files are relative to ``root``. Raises SpecError."""
    check_fits("the fleet has no field", values, _TOP)
    shared, deltas = _table(values.get("all", {}), "all"), _table(values.get("delta", {}), "delta")
    if not deltas:
        raise SpecError("the fleet has no delta; name at least one: [delta.NAME]")
    members = [member for name, own in deltas.items() for member in _members(name, _table(own, name), shared, root)]
    names = [member.name for member in members]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise SpecError(f"two deltas are called {twice!r}; rename one")
    numbers = {name: _whole(name, values[name]) for name in ("max_tokens", "save_every") if name in values}
    return FleetSpec(tuple(members), _text("backbone", values.get("backbone")), **numbers)


def _members(name: str, own: Values, shared: Values, root: Path) -> Iterator[MemberSpec]:
    """The deltas that a table stands for: one, or the combinations of its grid."""
    grid = _table(own.get("grid", {}), f"{name}.grid")
    wrong = next((key for key, options in grid.items() if not isinstance(options, list) or not options), None)
    if wrong is not None:
        raise SpecError(f"{name}.grid.{wrong} is {grid[wrong]!r}; expected a list of values")
    for chosen in itertools.product(*grid.values()):
        values = {key: value for key, value in own.items() if key != "grid"} | dict(zip(grid, chosen, strict=True))
        full = "-".join([name, *(_worded(value) for value in chosen)])
        try:
            yield _member(full, values, shared, root)
        except BertologyError as error:
            raise SpecError(f"delta.{full}: {error}") from None


def _member(name: str, own: Values, shared: Values, root: Path) -> MemberSpec:
    check_name(name, "delta name")
    for table in (own, shared):
        check_fits("a delta has no field", (key for key in table if key != "grid"), (*SOURCES, *OWN, *KINDS))
    values = {**shared, **own}
    method = TrainConfig.of(values.get("task", ""), values.get("method", ())).method
    kinds = {field.name: field.metadata["kind"] for field in fields(KindFlags)}
    wanted = {key for key in values if key in own or key in OWN or kinds.get(key) in method} - {*SOURCES}
    config = read_settings({key: value for key, value in values.items() if key in wanted})
    if "train" not in values:
        raise SpecError("it has no train; name a file of records")
    columns = _table(values.get("columns", {}), "columns")
    sources = {key: _place(key, values.get(key), root) for key in SOURCES[:3]}
    return MemberSpec(name, config, columns=columns, **sources)  # type: ignore[arg-type]


def _place(key: str, value: object, root: Path) -> str | None:
    text = _text(key, value)
    return text if text is None or text.startswith(("hub:", "set:")) else str(root / text)


def _text(key: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise SpecError(f"{key} is {value!r}; expected text")
    return value


def _whole(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpecError(f"{key} is {value!r}; expected a whole number from 1 up")
    return value


def _table(value: object, name: str) -> Values:
    if not isinstance(value, Mapping):
        raise SpecError(f"{name} is {value!r}; expected a table")
    return value


def _worded(value: object) -> str:
    """A value as a part of a delta's name."""
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(map(str, value if isinstance(value, list) else [value])).lower())
