"""A training run's settings by the names of its flags, as ``config.toml`` and grids hold them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bertology_serve.config_fields import check_fits, choices_of, split_list
from bertology_serve.errors import SpecError
from bertology_serve.files import JsonObject
from bertology_serve.training.method_options import KindFlags, Values
from bertology_serve.training.train_config import TrainConfig

OWN = tuple(choice.field.name for choice in choices_of(TrainConfig) if choice.field.name != "options")
KINDS = tuple(field.name for field in fields(KindFlags))
HEADER = "# bertology-serve train --config THIS --out DIR; a flag that is given too counts before this file.\n"
LISTS: Mapping[type, frozenset[str]] = {
    owner: frozenset(choice.field.name for choice in choices_of(owner) if "tuple" in str(choice.hint))
    for owner in (TrainConfig, KindFlags)
}
"""The fields of each dataclass that are tuples."""


def read_settings(values: Values) -> TrainConfig:
    """``{"task": "classification", "method": "lora", "rank": 4}`` -> the configuration that these flags give.

    A list may be a list, or a text with commas. Raises SpecError for an unknown name, naming the nearest.
    """
    named = {name.replace("-", "_"): value for name, value in values.items()}
    check_fits("train has no flag", named, OWN + KINDS)
    config = TrainConfig.of(**{name: _listed(TrainConfig, name, named[name]) for name in OWN if name in named})
    kinds = {name: _listed(KindFlags, name, named[name]) for name in KINDS if name in named}
    return config.replaced(options=KindFlags(**kinds).by_kind())


def settings_of(config: TrainConfig) -> JsonObject:
    """The inverse of ``read_settings``: every flag that has a value. Raises SpecError for an option without a flag."""
    own = {name: value for name, value in config.as_dict().items() if name in OWN}
    flags = {(flag.metadata["kind"], flag.metadata["field"]): flag.name for flag in fields(KindFlags)}
    spans = [config.options.get(kind, {}).get("layers") for kind in config.method]
    shared = spans[0] if spans.count(spans[0]) == len(spans) else None
    for kind, options in config.options.items():
        for field, value in options.items():
            if (kind, field) in flags:
                own[flags[kind, field]] = value
            elif field == "layers" and value in (None, shared):
                own["layers"] = list(map(str, value)) if value else own["layers"]
            else:
                raise SpecError(f"field {field!r} of {kind} has no flag; leave it out of what a file shall hold")
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in own.items()
        if value not in (None, [], ())
    }


def settings_text(config: TrainConfig, files: Mapping[str, str], prepack: bool) -> str:
    """``config.toml``: the flags of a run, ``files`` among them; options without a flag are in a comment."""
    known = {field.name for field in fields(KindFlags)}
    try:
        own = settings_of(config)
    except SpecError as problem:
        own, lost = settings_of(config.replaced(options={})), f"# not a whole run: {problem}\n"
    else:
        lost = ""
    order = {**files, **{name: own[name] for name in own if name not in known}, **own, "prepack": prepack}
    return HEADER + lost + "".join(f"{name} = {_toml(value)}\n" for name, value in order.items())


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _listed(owner: type, name: str, value: Any) -> Any:
    """A text with commas as a tuple where the field is one."""
    if name not in LISTS[owner]:
        return value
    if isinstance(value, str):
        return tuple(int(part) if part.isdecimal() else part for part in split_list(value))
    return tuple(value) if isinstance(value, list) else value
