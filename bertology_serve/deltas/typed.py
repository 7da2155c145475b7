"""Builds frozen dataclasses from JSON, every field's type checked against its annotation."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from bertology_serve.errors import FormatError, SpecError, nearest

T = TypeVar("T")
_LARGEST = 2**53  # beyond it JSON readers disagree
_JSON_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def build(cls: type[T], values: object, where: str) -> T:
    """An instance of the dataclass ``cls``; raises FormatError naming the field, what it holds and what it should."""
    table = as_object(values, where)
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    check_keys(table, known, where)
    needed = (f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING)
    lacking = [name for name in needed if name not in table]
    if lacking:
        raise FormatError(f"{where} lacks the field {lacking[0]!r}; write the file again")
    hints = get_type_hints(cls)
    checked = {name: conform(value, hints[name], f"{where}.{name}") for name, value in table.items()}
    try:
        return cls(**checked)
    except (SpecError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: {error}") from None


def as_object(values: object, where: str) -> Mapping[str, Any]:
    """``values`` if it is a JSON object."""
    if not isinstance(values, Mapping):
        raise FormatError(f"{where} is {_shown(values)}; expected an object")
    return values


def check_keys(table: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Raises FormatError for a key that is not known, naming the nearest that is."""
    for name in table:
        if name not in known:
            raise FormatError(f"{where} has an unknown field {name[:80]!r}; {nearest(name[:80], known)}")


def conform(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotation ``hint`` has it (lists become tuples, whole numbers floats where floats are due)."""
    if get_origin(hint) in (Union, types.UnionType):
        return _conform_union(value, get_args(hint), where)
    if get_origin(hint) is tuple:
        return _conform_tuple(value, get_args(hint), where)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and plain and abs(value) < 1e300:
        return float(value)
    if hint is int and plain and isinstance(value, int) and abs(value) < _LARGEST:
        return value
    if hint in (str, bool, type(None)) and isinstance(value, hint):
        return value
    raise FormatError(f"{where} is {_shown(value)}; expected {_JSON_NAMES[hint]}")


def _conform_union(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in hints:
        return None
    rest = [hint for hint in hints if hint is not type(None)]
    return conform(value, rest[0], where)


def _conform_tuple(value: Any, hints: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise FormatError(f"{where} is {_shown(value)}; expected a list")
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(hints) != len(value):
        raise FormatError(f"{where} has {len(value)} entries; expected {len(hints)}")
    return tuple(conform(item, hint, f"{where}[{i}]") for i, (item, hint) in enumerate(zip(value, hints, strict=True)))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
