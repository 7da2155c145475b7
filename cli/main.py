"""The command ``bertology-serve``: one file per command in this folder, each imported when it is needed."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import bertology_serve
from bertology_serve.cli.common import complain, share_cores

PROGRAM = "bertology-serve"
# What a shell says as it asks for completions: that it does, and the words so far
COMPLETE, COMPLETED = "_BERTOLOGY_SERVE_COMPLETE", ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")
COMMANDS = {
    "demo": "Try all of it on built-in examples, in a few minutes.",
    "train": "Train one delta.",
    "train-fleet": "Train many deltas at once over one frozen encoder.",
    "compress": "Write a fully tuned model as a small delta.",
    "reproduce": "Run a grid of trainings; its table.",
    "mine-negatives": "Find hard negatives for pairs of texts.",
    "convert": "Read adapters of other libraries, and write AdapterHub's.",
    "evaluate": "Measure a delta on labelled records.",
    "ask": "Ask a delta, or a running server, something.",
    "predict": "Answer a file of records, for many deltas at once.",
    "serve": "Answer over HTTP.",
    "route": "Send calls to several servers, each where its delta lives.",
    "plan": "Find how many servers given calls need.",
    "export": "Write delta and encoder as ONNX or OpenVINO, checked.",
    "analyze": "See what heads, layers and deltas do.",
    "inspect": "Show and validate a delta.",
    "push": "Upload a delta to the HuggingFace hub.",
    "pull": "Download a delta from the HuggingFace hub.",
    "bench": "Measure speed on this machine, beside the alternatives.",
    "prove": "Measure what the server promises.",
    "doctor": "Find what is wrong with this installation.",
}
"""Each is ``bertology_serve.cli.NAME`` (``-`` as ``_``) with a function NAME or, for subcommands, an ``app``; its
docstring is its own help, the line here is what ``bertology-serve --help`` says of it."""
ELSEWHERE = {
    "push": "cli.push_pull",
    "pull": "cli.push_pull",
    "bench": "bench.commands",
    "prove": "bench.prove.prove_command",
}
"""Commands that stand two in one module, and those of the harness, which stand with it."""
GREETING = """bertology-serve {version}: one frozen encoder, many small deltas, one packed batch.

  bertology-serve demo      trains a delta of each kind on built-in examples, serves and exports them: minutes
  bertology-serve train --backbone minilm --task classification --train FILE.csv --out deltas/NAME
  bertology-serve ask deltas/NAME "A text."

FILE.csv has columns text and label. bertology-serve --help lists all {count} commands."""


def application(asked: str | None = None) -> typer.Typer:
    """The typer application. Only the command that is asked for is imported; the others are there to be listed."""
    app = typer.Typer(
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback()(_program)
    for name, line in COMMANDS.items():
        if name != asked:
            app.command(name, help=line)(lambda: None)
            continue
        place = ELSEWHERE.get(name) or f"cli.{name.replace('-', '_')}"
        module = importlib.import_module(f"bertology_serve.{place}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            command = getattr(module, name.replace("-", "_"))
            layout = getattr(command, "layout", None)  # of those with many options, see ``options.laid_out``
            settings = {"auto_envvar_prefix": layout.prefix} if layout and layout.prefix else {}
            app.command(name, cls=layout and layout.form, context_settings=settings)(command)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (``sys.argv`` by default) and returns its exit code.

    0: done; 1: a result differs from its reference; 2: the input cannot be used; 70: a fault of this program;
    130: interrupted. Errors are one line on stderr; ``BERTOLOGY_DEBUG=1`` shows where they came from.
    """
    share_cores()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments and COMPLETE not in os.environ:
        print(GREETING.format(version=bertology_serve.__version__, count=len(COMMANDS)))
        return 0
    typed = " ".join(os.environ.get(name, "") for name in COMPLETED) if COMPLETE in os.environ else ""
    asked = next((word for word in (*typed.split(), *arguments) if word in COMMANDS), None)
    try:
        command = typer.main.get_command(application(asked))
        code = command.main(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    except (Exception, KeyboardInterrupt) as problem:
        return complain(problem)
    return code if isinstance(code, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {bertology_serve.__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """One frozen encoder, many small deltas of every kind, one packed batch."""
