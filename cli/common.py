"""What all commands share: how they fail, and how they speak to a person.

Results go to stdout, everything else to stderr: ``predict --output - | head`` stays clean.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from bertology_serve.errors import BertologyError, VerificationError

if TYPE_CHECKING:
    import typer
    from rich.console import Console
    from rich.progress import Progress

DIFFERS, BAD_INPUT, FAULT, INTERRUPTED = 1, 2, 70, 130
DEBUG = "BERTOLOGY_DEBUG"
PIPE_WIDTH = 120
POLICY, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
SHORT = "10000"


def complain(problem: BaseException) -> int:
    """Says in one line on stderr what went wrong, and returns the exit code (see ``main``)."""
    if os.environ.get(DEBUG, "") not in ("", "0"):
        traceback.print_exception(problem)
    code, message = _judged(problem)
    if message:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _judged(problem: BaseException) -> tuple[int, str]:
    if isinstance(problem, BertologyError):
        return DIFFERS if isinstance(problem, VerificationError) else BAD_INPUT, str(problem)
    if isinstance(problem, KeyboardInterrupt):
        return INTERRUPTED, ""
    if hasattr(problem, "format_message"):  # a usage error of typer, whose classes are private
        context, param = getattr(problem, "ctx", None), getattr(problem, "param", None)
        told = problem.format_message() + (came_from(context, [param]) if context and param else "")
        return BAD_INPUT, told + (f" (see {context.command_path} --help)" if context else "")
    if isinstance(problem, OSError) and problem.strerror:
        return BAD_INPUT, f"{problem.strerror}: {problem.filename}" if problem.filename else problem.strerror
    return FAULT, f"unexpected {type(problem).__name__}: {problem} (this is a fault; {DEBUG}=1 shows where)"


def came_from(context: typer.Context, params: Iterable[Any]) -> str:
    """Where options that were no flags got their values, and these: ``, from BERTOLOGY_PORT='abc'``."""
    found = []
    for param in params:
        source = getattr(context.get_parameter_source(str(param.name)), "name", "")
        if source == "ENVIRONMENT":
            name = param.envvar or f"{context.auto_envvar_prefix}_{str(param.name).upper()}"
            found.append(f"{name}={os.environ.get(name, '')!r}")
        elif source == "DEFAULT_MAP":
            file = context.params.get("file")
            found.append(f"{file or 'the file or set'}: {param.name} = {(context.default_map or {})[param.name]!r}")
    return f", from {' and '.join(found)}" if found else ""


def note(message: str) -> None:
    """One line for the person, on stderr."""
    print(message, file=sys.stderr, flush=True)


def note_next(*commands: Sequence[object]) -> None:
    """What to type next: each command's words, quoted as a shell wants them."""
    import shlex  # not for --help

    for words in commands:
        note(f"  {shlex.join(['bertology-serve', *map(str, words)])}")


def truncation(cut: int, count: int) -> str:
    """The warning where texts were cut."""
    return f"warning: {cut:,} of {count:,} texts were cut to their delta's max_length; what stood behind was not read"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], stderr: bool = True) -> None:
    """Prints a table; numbers are set to the right. ``stderr=False`` where the table is the result."""
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", title_style="bold")
    cells = [list(row) for row in rows]
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(isinstance(row[index], (int, float)) for row in cells)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*map(_shown, row))
    console_of(stderr).print(drawn)


def progress(*fields: str) -> Progress:
    """A progress bar on stderr, silent where that is no terminal.

    ``fields`` are names of task fields that are shown after the bar, such as ``loss`` or ``speed``; give them as
    strings: ``bar.update(task, advance=1, loss="0.412")``.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = [TextColumn(f"{name} {{task.fields[{name}]}}") for name in fields]
    console = console_of(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *shown, TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def console_of(stderr: bool) -> Console:
    """The console that tables and bars are drawn on."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


def _shown(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def share_cores() -> bool:
    """Lets torch's threads spin some microseconds for each other and then sleep; for before torch is imported.

    A packed batch is hundreds of short products: threads that sleep at once pay a wake-up for each (batches a fifth
    slower), while libgomp's default spins for milliseconds and keeps the cores from a server's event loop, tokenizers
    and other processes (batches up to 17 times slower where two other processes were busy). Two threads on two cores
    of an AMD EPYC, torch 2.13. What the environment says already is left alone; false where that, or torch, was
    first.
    """
    if "torch" in sys.modules or {SPINS, POLICY} & os.environ.keys():
        return False
    os.environ[SPINS] = SHORT
    return True
