"""``bertology-serve bench alternatives``: this server beside what one would build instead."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bertology_serve.cli.common import load_library, note, progress, table
from bertology_serve.errors import SpecError
from bertology_serve.files import write_json

MEGA = 2**20


def alternatives(
    backbone: Annotated[str, typer.Option(help="Encoder: a hub id, a directory, or minilm.")] = "minilm",
    tasks: Annotated[int, typer.Option(help="LoRA classifiers that are asked.", min=1)] = 8,
    many: Annotated[int, typer.Option(help="How many of them the memory is looked at with.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="How often each server is timed.", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="How long each time.")] = 10.0,
    output: Annotated[Path | None, typer.Option(help="Write everything to this .json file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it there (.png).")] = None,
) -> None:
    """Serve the same tasks here, by peft, by merged pipelines and by merged ONNX sessions behind FastAPI.

    Each server is a process of its own with one thread for its model; lengths are mixed. They take turns: saturated,
    then all at half of what the slowest can answer. Merged models are written to a temporary directory.
    """
    load_library(backbone=backbone)
    from bertology_serve.bench.prove.stage import Stage
    from bertology_serve.bench.serving.alternatives.alternatives_run import Plan, compare, draw
    from bertology_serve.bench.serving.load import check_plot
    from bertology_serve.export.installation import environment

    check_plot(plot)
    if output is not None and output.suffix != ".json":
        raise SpecError(f"cannot write {output}: expected a name that ends in .json")
    plan = Plan(tasks, many, rounds, seconds, different=tasks)
    where = environment()
    with tempfile.TemporaryDirectory() as directory, progress() as bar:
        task = bar.add_task("rounds", total=2 * rounds + 1)
        found = compare(Stage(backbone, Path(directory), quick=False), plan, lambda: bar.advance(task))
    names = ("", "texts/s", "CPU ms a text", f"p50 ms at {found.rate:.1f}/s", "p99 ms",
             f"MB, {tasks} tasks", f"MB, {many} tasks")  # fmt: skip
    rows = [
        (row.name, row.texts_s, row.cpu_ms, row.p50_ms, row.p99_ms, row.bytes_few / MEGA, row.bytes_many / MEGA)
        for row in found.rows
    ]
    table(f"the same {tasks} tasks, {backbone}", names, rows, stderr=False)
    note(f"{where['cpu']}, {where['cores']} cores, load {where['load_before']}; {where['date']}")
    if not found.pinned:
        note("one core only: servers and client shared it")
    if output is not None:
        everything = {"benchmark": "alternatives", "backbone": backbone, "environment": where, **found.as_dict()}
        write_json(output, everything)
    if plot is not None:
        draw(found, plot)
