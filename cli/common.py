"""What all commands share: how they fail, and how they speak to a person.

Results go to stdout, everything else to stderr: ``predict --output - | head`` stays clean.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertology_serve.errors import BertologyError, NotFound, SpecError, VerificationError

if TYPE_CHECKING:
    import typer
    from rich.console import Console
    from rich.progress import Progress

DIFFERS, BAD_INPUT, FAULT, INTERRUPTED = 1, 2, 70, 130
DEBUG = "BERTOLOGY_DEBUG"
PIPE_WIDTH = 120
DEVICES = re.compile(r"auto|(cpu|cuda|mps|xpu|meta)(:\d+)?")
FILE = re.compile(r"(?!hub:|set:).*\.(jsonl|ndjson|json|csv|tsv|conll|conllu|parquet|txt)(\.gz)?", re.IGNORECASE)
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


def check_inputs(
    *,
    deltas: Iterable[Path | None] = (),
    root: Path | None = None,
    data: Iterable[str | None] = (),
    backbone: str | None = None,
    device: str = "auto",
) -> None:
    """Says what can be known to be wrong before anything heavy is imported: deltas, a directory of deltas (``root``),
    files of records and encoders that are not there, devices that do not exist. Raises NotFound, SpecError.
    """
    for path in deltas:
        if path is not None and not path.exists():
            raise NotFound(f"no directory {path}; expected a delta's (with delta.json)")
    if root is not None and not root.is_dir():
        raise NotFound(f"no directory {root}; expected one with deltas in it (NAME/VERSION/ or bare)")
    for name in data:
        if name is not None and FILE.fullmatch(name) and not os.path.exists(name):
            raise NotFound(f"no file {name}; give a file that exists, or hub:NAME for a hub data set")
    if backbone is not None and re.match(r"[./~]|.*/.*/", backbone) and not os.path.isdir(backbone):
        raise NotFound(f"no encoder {backbone!r}: no such directory; expected a hub id, a directory or 'minilm'")
    if not DEVICES.fullmatch(device):
        raise SpecError(f"unknown device {device!r}; expected auto, cpu, cuda or cuda:INDEX")


def load_library(**given: Any) -> None:
    """``check_inputs``, and then imports torch and what stands on it: seconds, beside a spinner on a terminal."""
    check_inputs(**given)
    if "torch" in sys.modules:
        return
    with console_of(stderr=True).status("loading torch and the encoder's library"):
        import bertology_serve.encoder.opening  # noqa: F401


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
