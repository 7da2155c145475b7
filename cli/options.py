"""Command-line options from the fields of frozen dataclasses, so that no default is written twice; their help; and
flags that give other flags their values: a TOML file, or the name of a well-known data set."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperOption

from bertology_serve.cli.common import came_from, note
from bertology_serve.config_fields import (
    SpecOption,
    check_fits,
    choices_of,
    join_list,
    nested,
    split_list,
    without_none,
)
from bertology_serve.errors import NotFound, SpecError, nearest

PLAIN = (bool, int, float, str, Path)
ALL = "bertology.help_all"
OTHERS = "Other options"
ELSEWHERE = ("API_KEYS", "ADMIN_KEYS", "CACHE", "CONFIG", "DATA", "DEBUG", "KEY", "REAL", "ROUTER_KEY")
"""What variables are called that are no options, or not of this command alone."""
Command = Callable[..., Any]

Spec = type[Any]  # a dataclass


def options(
    spec: Spec, into: str = "config", skip: Sequence[str] = (), helps: Mapping[str, str] | None = None
) -> Callable[[Command], Command]:
    """Decorator: the command's parameter ``into`` becomes one option per field of the dataclass ``spec``.

    The command then gets ``into=spec(...)``. A field named ``batch_tokens`` is ``--batch-tokens``; its type, its
    default and ``field(metadata={"help": ..., "flag": ...})`` are the option's, and a field without default is
    required. A field that is a dataclass stands for its fields, shown under its ``metadata["panel"]``. Tuples are
    written with commas. ``skip`` names fields that keep their defaults; ``helps`` gives help by field. Raises
    TypeError, where the command is declared, for a field whose type has no option.
    """
    offered = [choice for choice in choices_of(spec) if choice.field.name not in skip]

    def decorate(command: Command) -> Command:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != into]
        added = [_parameter(spec, choice, (helps or {}).get(choice.field.name)) for choice in offered]

        @functools.wraps(command)
        def run(**values: object) -> object:
            given = {one.field.name: _value(values.pop(one.field.name), one.hint, one.field) for one in offered}
            return command(**values, **{into: nested(spec, given, "the command has no option")})

        return _signed(run, [*own, *added])

    return decorate


class HelpLayout(NamedTuple):
    """How a command's help is laid out: ``--help`` shows the options that people use (``common``), ``--help-all`` the
    rest, each under its panel. ``panels`` names those of options that have none of their own.

    With a ``prefix`` every option has an environment variable: ``BERTOLOGY_MAX_ITEMS`` for ``--max-items``.
    """

    common: tuple[str, ...]
    panels: Mapping[str, tuple[str, ...]]
    prefix: str | None = None

    @property
    def form(self) -> type[LaidOut]:
        return LaidOut


def laid_out(
    common: Sequence[str], panels: Mapping[str, tuple[str, ...]], prefix: str | None = None
) -> Callable[[Command], Command]:
    """Decorator: gives a command ``--help-all`` and its layout, see ``HelpLayout``."""

    def show_all(context: typer.Context, wanted: bool) -> None:
        if wanted:
            context.meta[ALL] = True
            typer.echo(context.get_help())
            raise typer.Exit

    option = typer.Option(
        "--help-all", is_eager=True, callback=show_all, expose_value=False, allow_from_autoenv=False,
        help="Show every option.",
    )  # fmt: skip

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(help_all: bool = False, **values: object) -> object:
            return command(**values)

        own = list(inspect.signature(command, eval_str=True).parameters.values())
        kind, annotation = inspect.Parameter.KEYWORD_ONLY, Annotated[bool, option]
        _signed(run, [*own, inspect.Parameter("help_all", kind, default=False, annotation=annotation)])
        run.layout = HelpLayout(tuple(common), panels, prefix)  # type: ignore[attr-defined]
        return run

    return decorate


class LaidOut(TyperCommand):
    """A command whose function is ``laid_out``."""

    def invoke(self, ctx: Any) -> Any:
        """Runs it. A SpecError says where the options that it names came from; unknown variables are warned of."""
        layout, params = self.callback.layout, self.get_params(ctx)  # type: ignore[union-attr]
        if layout.prefix:
            _warn_unknown(layout.prefix, [str(param.name) for param in params])
        try:
            return super().invoke(ctx)
        except SpecError as problem:
            named = set(re.findall(r"\w+", str(problem)))
            source = came_from(ctx, [param for param in params if param.name in named])
            if not source:
                raise
            raise SpecError(f"{problem}{source}") from problem

    def format_options(self, ctx: Any, formatter: Any) -> None:
        layout: HelpLayout = self.callback.layout  # type: ignore[union-attr]
        panel_of = {name: panel for panel, names in layout.panels.items() for name in names}
        shown: dict[str, list[tuple[str, str]]] = {panel: [] for panel in layout.panels}
        hidden = 0
        for param in self.get_params(ctx):
            panel = getattr(param, "rich_help_panel", None) or panel_of.get(str(param.name), OTHERS)
            if isinstance(param, TyperOption):
                param.show_envvar = False  # they are all made in one way, which is said below
            record = param.get_help_record(ctx)
            if panel != OTHERS and not ctx.meta.get(ALL) and param.name not in layout.common:
                hidden += 1
            elif record is not None:
                shown.setdefault(panel, []).append(record)
        shown[OTHERS] = shown.pop(OTHERS, [])
        for panel, rows in shown.items():
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows)
        formatter.write_paragraph()
        if hidden:
            formatter.write_text(f"{hidden} more: --help-all")
        if layout.prefix:
            formatter.write_text(
                f"Every option has a variable: {layout.prefix}_PORT for --port. A flag wins over the environment, that "
                "over the file of --config, that over the default."
            )


def _warn_unknown(prefix: str, options: Sequence[str]) -> None:
    """Names the environment's variables that no option has: they are misspelt, or for another program."""
    known = [*(f"{prefix}_{name.upper()}" for name in options), *(f"{prefix}_{name}" for name in ELSEWHERE)]
    for name in sorted(os.environ):
        if name.startswith(f"{prefix}_") and name not in known:
            note(f"warning: the variable {name} sets nothing; {nearest(name, known)}")


def _signed(run: Command, parameters: Sequence[inspect.Parameter]) -> Command:
    only = inspect.Parameter.KEYWORD_ONLY
    keyed = [p if p.kind is only else p.replace(kind=only) for p in parameters]
    run.__signature__ = inspect.Signature(keyed)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in keyed}
    return run


def listed(text: str | None) -> tuple[str, ...] | None:
    """``"query, value"`` -> ``("query", "value")``; ``None`` stays ``None``. See ``split_list``."""
    return None if text is None else split_list(text)


def _parameter(spec: Spec, choice: SpecOption, help_text: str | None) -> inspect.Parameter:
    field = choice.field
    default = field.default if field.default_factory is MISSING else field.default_factory()
    flag = field.metadata.get("flag", "--" + field.name.replace("_", "-"))
    negated = f"{flag}/--no-{flag.removeprefix('--')}" if without_none(choice.hint)[0] is bool else flag
    option = typer.Option(negated, help=help_text or field.metadata.get("help"), rich_help_panel=choice.panel)
    if isinstance(default, tuple):
        default = join_list(default) if default else ""  # without csv, for --help
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[_option_type(spec, field.name, choice.hint), option],
    )


def _option_type(spec: Spec, name: str, hint: object) -> object:
    inner, optional = without_none(hint)
    if get_origin(inner) is tuple:
        inner = str
    if inner not in PLAIN and get_origin(inner) is not Literal:
        raise TypeError(f"{spec.__name__}.{name}: a field of type {hint} has no command-line option; skip it")
    return inner | None if optional else inner


def _value(value: object, hint: object, field: Field[object]) -> object:
    inner, _ = without_none(hint)
    if get_origin(inner) is not tuple or value is None:
        return value
    kind = get_args(inner)[0]
    try:
        return tuple(kind(part) for part in listed(str(value)) or ())
    except ValueError as problem:
        raise SpecError(f"{field.name} is {value!r}; expected {kind.__name__}s with commas between") from problem


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
    check_fits(f"{path}: {context.command.name} has no flag", named, known)
    _fill(context, named)
    return path


def from_set(context: typer.Context, name: str | None) -> str | None:
    """Task, training data and, where the set has them, evaluation data. Raises NotFound."""
    if name is None:
        return None
    from bertology_serve.data.formats import SET_PREFIX
    from bertology_serve.data.set_files import find_set, has_split

    values = {"task": find_set(name).task, "train": f"{SET_PREFIX}{name}:train"}
    _fill(context, values | ({"eval": f"{SET_PREFIX}{name}:dev"} if has_split(name, "dev") else {}))
    return name


def _fill(context: typer.Context, values: Mapping[str, Any]) -> None:
    """Gives flags other defaults; lists and tables are written with commas. What was filled first stays."""
    context.default_map = {**{name: _plain(value) for name, value in values.items()}, **(context.default_map or {})}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return join_list(f"{name}={own}" for name, own in value.items())
    return join_list(value) if isinstance(value, list) else value


File = Annotated[
    Path | None,
    typer.Option(
        "--config", envvar="BERTOLOGY_CONFIG", is_eager=True, callback=from_file,
        help="TOML file with options by name, such as max-items = 64.",
    ),
]  # fmt: skip
