"""``bertology-serve bench load``: a server under load that does not wait for it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from bertology_serve.cli.common import load_library, note, progress, table
from bertology_serve.errors import SpecError
from bertology_serve.files import write_json

Rates = Annotated[str, typer.Option(help="Calls a second, with commas between.")]
Arrivals = Annotated[Literal["poisson", "bursty"], typer.Option(help="Bursty: eight at once on average.")]


def load(
    backbone: Annotated[str, typer.Option(help="Encoder: a hub id, a directory, or minilm.")] = "minilm",
    rates: Rates = "10,20,40,80",
    seconds: Annotated[float, typer.Option(help="How long each rate is held.")] = 10.0,
    arrivals: Arrivals = "poisson",
    deltas: Annotated[int, typer.Option(help="Deltas of all kinds in turn.", min=1)] = 32,
    zipf: Annotated[
        float, typer.Option(help="The k-th delta is asked as often as k to the power of minus this.")
    ] = 1.1,
    seed: Annotated[int, typer.Option(help="Seed of arrivals, texts and deltas.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write everything to this .json file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the saturation curve there (.png).")] = None,
) -> None:
    """Offer a server more and more calls, and see what becomes of them.

    Open loop: calls come whether or not those before were answered, and their time counts from when they were due.
    """
    load_library(backbone=backbone)
    from bertology_serve.bench.serving.load import Load, as_dict, check_plot, draw, run

    check_plot(plot)
    if output is not None and output.suffix != ".json":
        raise SpecError(f"cannot write {output}: expected a name that ends in .json")
    work = Load(_numbers(rates), seconds, arrivals, deltas, zipf, seed=seed)
    with tempfile.TemporaryDirectory() as directory, progress() as bar:
        task = bar.add_task("rates", total=len(work.rates))
        points = run(backbone, work, Path(directory), lambda: bar.advance(task))
    rows = [(one.offered, one.answered, one.refused, one.broken, *one.milliseconds.values()) for one in points]
    names = (
        "offered/s",
        "answered/s",
        "refused/s",
        "broken",
        *(name.replace("_", " ") for name in points[0].milliseconds),
    )
    table(f"{arrivals} arrivals over {deltas} deltas, {backbone}", names, rows, stderr=False)
    everything = as_dict(backbone, work, points)
    where = everything["environment"]
    note(f"{where['cpu']}, {where['threads']} of {where['cores']} cores, load {where['load_before']}; {where['date']}")
    if output is not None:
        write_json(output, everything)
    if plot is not None:
        draw(points, plot)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise SpecError(f"--rates is {text!r}; expected numbers with commas between") from None
