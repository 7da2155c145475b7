"""Flags that give other flags their values: a TOML file, or the name of a well-known data set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from bertology_serve.errors import NotFound, SpecError, nearest
from bertology_serve.training.method_options import join_list


def from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Every key of the file becomes the value of the flag of that name, unless it is given too.

    Raises NotFound, and SpecError for what is no TOML or no flag, naming the nearest.
    """
    if path is None:
        return None
    if not path.is_file():
        raise NotFound(f"no file {path}; give a TOML file, such as the config.toml beside a delta")
    import tomllib  # not for --help

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise SpecError(f"{path}: not TOML ({problem}); expected lines such as epochs = 3") from None
    named = {name.replace("-", "_"): value for name, value in values.items()}
    if len(named) < len(values):
        twice = next(name for name in values if "-" in name and name.replace("-", "_") in values)
        raise SpecError(f"{path}: {twice} and {twice.replace('-', '_')} are one flag; give it once")
    known = [str(one.name) for one in context.command.params]
    for name in named:
        if name not in known:
            raise SpecError(f"{path}: {context.command.name} has no flag {name!r}; {nearest(name, known)}")
    _fill(context, named)
    return path


def from_set(context: typer.Context, name: str | None) -> str | None:
    """Task, training data and, where the set has them, evaluation data. Raises NotFound."""
    if name is None:
        return None
    from bertology_serve.data.set_files import PREFIX, find_set, has_split

    values = {"task": find_set(name).task, "train": f"{PREFIX}{name}:train"}
    _fill(context, values | ({"eval": f"{PREFIX}{name}:dev"} if has_split(name, "dev") else {}))
    return name


def _fill(context: typer.Context, values: Mapping[str, Any]) -> None:
    """Gives flags other defaults; lists and tables are written with commas. What was filled first stays."""
    context.default_map = {**{name: _plain(value) for name, value in values.items()}, **(context.default_map or {})}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return join_list(f"{name}={own}" for name, own in value.items())
    return join_list(value) if isinstance(value, list) else value
