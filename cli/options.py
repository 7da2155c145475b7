"""Command-line options from the fields of frozen dataclasses, so that no default is written twice."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from bertology_serve.errors import SpecError
from bertology_serve.training.method_options import join_list, split_list

PLAIN = (bool, int, float, str, Path)


def options(
    spec: type[Any], into: str = "config", skip: Sequence[str] = (), helps: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the command's parameter ``into`` becomes one option per field of the dataclass ``spec``.

    The command then gets ``into=spec(...)``. A field named ``batch_tokens`` is ``--batch-tokens``; its type, its
    default and ``field(metadata={"help": ..., "flag": ...})`` are the option's, and a field without default is
    required. Tuples are written with commas. ``skip`` names fields that keep their defaults; ``helps`` gives help by
    field. Raises TypeError, where the command is declared, for a field whose type has no option.
    """
    hints = get_type_hints(spec)
    offered = [field for field in fields(spec) if field.init and field.name not in skip]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != into]
        added = [_parameter(spec, field, hints[field.name], (helps or {}).get(field.name)) for field in offered]

        @functools.wraps(command)
        def run(**values: Any) -> Any:
            chosen = {field.name: _value(values.pop(field.name), hints[field.name], field) for field in offered}
            return command(**values, **{into: spec(**chosen)})

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *added)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def listed(text: str | None) -> tuple[str, ...] | None:
    """``"query, value"`` -> ``("query", "value")``; ``None`` stays ``None``. See ``split_list``."""
    return None if text is None else split_list(text)


def _parameter(spec: type[Any], field: Field[Any], hint: Any, help_text: str | None) -> inspect.Parameter:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    flag = field.metadata.get("flag", "--" + field.name.replace("_", "-"))
    negated = f"{flag}/--no-{flag.removeprefix('--')}" if _without_none(hint)[0] is bool else flag
    option = typer.Option(negated, help=help_text or field.metadata.get("help"))
    if isinstance(default, tuple):
        default = join_list(default)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[_option_type(spec, field.name, hint), option],
    )


def _option_type(spec: type[Any], name: str, hint: Any) -> Any:
    inner, optional = _without_none(hint)
    if get_origin(inner) is tuple:
        inner = str
    if inner not in PLAIN and get_origin(inner) is not Literal:
        raise TypeError(f"{spec.__name__}.{name}: a field of type {hint} has no command-line option; skip it")
    return inner | None if optional else inner


def _value(value: Any, hint: Any, field: Field[Any]) -> Any:
    inner, _ = _without_none(hint)
    if get_origin(inner) is not tuple or value is None:
        return value
    kind = get_args(inner)[0]
    try:
        return tuple(kind(part) for part in listed(value) or ())
    except ValueError as problem:
        raise SpecError(f"{field.name} is {value!r}; expected {kind.__name__}s with commas between") from problem


def _without_none(hint: Any) -> tuple[Any, bool]:
    """``X | None`` -> ``(X, True)``; any other type -> ``(it, False)``."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    rest = [kind for kind in get_args(hint) if kind is not types.NoneType]
    return (rest[0], True) if len(rest) == 1 else (hint, False)
