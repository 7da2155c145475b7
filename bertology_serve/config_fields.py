"""Configurations: frozen dataclasses, nested by concern; their fields are options that are given and stored by name."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import Field, asdict, field, fields, is_dataclass
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from bertology_serve.errors import SpecError, nearest

T = TypeVar("T")


def option(default: T, text: str, **metadata: object) -> T:
    """A field with a default and its help. ``least`` and ``most`` bound a number, see ``check_fields``."""
    made: T = field(default=default, metadata={"help": text, **metadata})
    return made


def named_fields(cls: type[T]) -> type[T]:
    """Decorator of a dataclass that people fill in: wrong names and values of its fields are a SpecError."""
    plain: Callable[..., None] = cls.__init__

    @functools.wraps(plain)
    def init(self: T, *given: Any, **named: Any) -> None:
        known = [one.name for one in fields(cls)]  # type: ignore[arg-type]
        check_fits(f"{cls.__name__} has no field", named, known)
        try:
            plain(self, *given, **named)
        except TypeError as error:
            raise SpecError(f"{cls.__name__}: {str(error).removeprefix(f'{cls.__name__}.__init__() ')}") from None

    cls.__init__ = init  # type: ignore[assignment]
    return cls


class SpecOption(NamedTuple):
    """One option of a configuration: its field, its type, its help's panel, and the group that it stands in."""

    field: Field[object]
    hint: object
    panel: str | None = None
    group: str | None = None


def choices_of(spec: type, panel: str | None = None, group: str | None = None) -> Iterator[SpecOption]:
    """The options of a configuration; those of a field that is itself a dataclass are its own fields, in its panel."""
    hints = get_type_hints(spec)
    for one in fields(spec):
        named = one.metadata.get("panel", panel)
        if is_dataclass(hints[one.name]):
            yield from choices_of(hints[one.name], named, one.name)
        elif one.init:
            yield SpecOption(one, hints[one.name], named, group)


def nested(spec: type[T], options: Mapping[str, Any], owner: str) -> T:
    """The configuration of that type with these options. Raises SpecError for one that ``owner`` does not have."""
    known = {choice.field.name: choice.group for choice in choices_of(spec)}
    check_fits(owner, options, known)
    own, groups = dict[str, Any](), dict[str, dict[str, Any]]()
    for name, value in options.items():
        group = known[name]
        (own if group is None else groups.setdefault(group, {}))[name] = value
    kinds = get_type_hints(spec)
    return spec(**own, **{group: kinds[group](**values) for group, values in groups.items()})


def flat(config: Any) -> dict[str, Any]:
    """The inverse of ``nested``: every option by its name."""
    found: dict[str, Any] = {}
    for name, value in asdict(config).items():
        found |= value if is_dataclass(getattr(config, name)) else {name: value}
    return found


def check_fields(config: Any) -> None:
    """Raises SpecError for a field whose value is none of its ``Literal``, or not from ``least`` to ``most``."""
    hints = get_type_hints(type(config))
    for one in fields(config):
        value, hint = getattr(config, one.name), without_none(hints[one.name])[0]
        if value is None:
            continue
        if get_origin(hint) is Literal:
            check_known(one.name, value, get_args(hint))
        if "least" in one.metadata:
            least, most = one.metadata["least"], one.metadata.get("most", math.inf)
            number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
            if not least <= number <= most or number == math.inf:
                limits = f"from {least}" + (f" to {most}" if most < math.inf else " up")
                raise SpecError(f"{one.name} is {value!r}; expected a number {limits}")


def check_fits(lacks: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raises SpecError for the first name that is not known: what ``lacks`` it, the name, and the nearest known one."""
    for name in names:
        if name not in known:
            raise SpecError(f"{lacks} {name!r}; {nearest(name, known) if known else 'it has none'}")


def check_known(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raises SpecError, naming the nearest known one, for a value that is none of those."""
    if value not in known:
        raise SpecError(f"unknown {name} {value!r}; {nearest(str(value), known)}")


def without_none(hint: object) -> tuple[Any, bool]:
    """``X | None`` -> ``(X, True)``; any other type -> ``(it, False)``."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    rest = [kind for kind in get_args(hint) if kind is not types.NoneType]
    return (rest[0], True) if len(rest) == 1 else (hint, False)


def split_list(text: str) -> tuple[str, ...]:
    """``"query, value"`` -> ``("query", "value")``. What holds a comma is quoted as in CSV: ``'"Rome, GA",Paris'``."""
    import csv  # not for --help

    try:
        parts = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error as problem:
        raise SpecError(
            f"{text!r} is no list ({problem}); expected values with commas, quoted where they hold one"
        ) from None
    return tuple(part.strip() for part in parts if part.strip())


def join_list(values: Iterable[object]) -> str:
    """The inverse of ``split_list``."""
    import csv
    import io

    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow([str(value) for value in values])
    return out.getvalue()
