"""``bertology-serve prove``: what the server promises, measured on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bertology_serve.cli.common import load_library, note, progress, table
from bertology_serve.cli.options import listed
from bertology_serve.errors import SpecError, VerificationError
from bertology_serve.files import write_json


def prove(
    backbone: Annotated[str, typer.Option(help="Encoder: a hub id, a directory, or minilm.")] = "minilm",
    quick: Annotated[bool, typer.Option("--quick", help="All of it in small, within five minutes.")] = False,
    only: Annotated[str | None, typer.Option(help="Numbers of figures, with commas between.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write everything to this .json file.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with code 1 where a promise is not kept.")] = False,
) -> None:
    """Measure the server's promises, each printed beside what came out.

    Servers run in processes of their own, with random deltas of several kinds. Figures in milliseconds mean little on
    a machine that does other things at the same time.
    """
    load_library(backbone=backbone)
    from bertology_serve.bench.prove.figure import prove as measure
    from bertology_serve.bench.prove.figures import FIGURES
    from bertology_serve.bench.prove.stage import Stage
    from bertology_serve.export.installation import environment

    numbers = listed(only)
    chosen = [figure for figure in FIGURES if numbers is None or str(figure.number) in numbers]
    if numbers is not None and len(chosen) != len(set(numbers)):
        known = ", ".join(str(figure.number) for figure in FIGURES)
        raise SpecError(f"figures {only}; expected some of {known}")
    if output is not None and output.suffix != ".json":
        raise SpecError(f"cannot write {output}: expected a name that ends in .json")
    where, lines = environment(), []
    with tempfile.TemporaryDirectory() as directory, progress("figure") as bar:
        task = bar.add_task("figures", total=len(chosen), figure="")
        stage = Stage(backbone, Path(directory), quick)
        for figure in chosen:
            bar.update(task, figure=str(figure.number))
            lines.append(measure(figure, stage))
            bar.advance(task)
    rows = [
        (
            line.number,
            line.promise,
            line.measured.words,
            "holds" if line.measured.holds else "MISSED",
            line.seconds,
            line.cpu_seconds,
        )
        for line in lines
    ]
    table(f"promises of the server, {backbone}", ("", "promise", "measured", "", "s", "CPU s"), rows, stderr=False)
    note(f"{where['cpu']}, {where['threads']} of {where['cores']} cores, load {where['load_before']}; {where['date']}")
    if output is not None:
        everything = {"backbone": backbone, "quick": quick, "environment": where,
                      "figures": [line.as_dict() for line in lines]}  # fmt: skip
        write_json(output, everything)
    missed = [str(line.number) for line in lines if not line.measured.holds]
    if check and missed:
        raise VerificationError(f"missed: figures {', '.join(missed)}")
