"""``bertology-serve bench``: what this machine does, beside the alternatives."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bertology_serve.bench.cpu.cpu_command import cpu
from bertology_serve.cli.common import load_library, note, progress, table
from bertology_serve.errors import SpecError, VerificationError

if TYPE_CHECKING:
    from bertology_serve.bench.serving.serving import Result
    from bertology_serve.files import JsonObject


app = typer.Typer(help="Measure speed on this machine, beside the alternatives.", rich_markup_mode=None)


@app.callback()
def _bench() -> None:
    """Measure speed on this machine, beside the alternatives."""


app.command()(cpu)
app.command("export", hidden=True)(cpu)


@app.command()
def serving(
    backbone: Annotated[str, typer.Option(help="Encoder: a hub id, a directory, or minilm.")] = "minilm",
    rounds: Annotated[int, typer.Option(help="How often each contender runs.", min=1)] = 30,
    threads: Annotated[int | None, typer.Option(help="Threads of torch. Default: torch's own.", min=1)] = None,
    sequences: Annotated[int, typer.Option(help="Sequences in the batch.", min=1)] = 64,
    deltas: Annotated[int, typer.Option(help="LoRA deltas among them.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of lengths, texts and deltas.")] = 0,
    engine: Annotated[
        Literal["torch", "onnx", "auto"], typer.Option(help="What runs our batches; auto: the faster one, as serve.")
    ] = "torch",
    output: Annotated[Path | None, typer.Option(help="Write everything to this .json or .csv file.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with code 1 where a bar is missed.")] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Also time a server, and write to this .json file what plan needs of it.")
    ] = None,
) -> None:
    """Time one mixed batch: this engine, itself without deltas, and peft's adapter_names (where peft is installed).

    Lengths are lognormal, mean 24 tokens, at most 128. Contenders take turns; ratios are medians over the rounds.
    """
    load_library(backbone=backbone)
    from bertology_serve.bench.serving.serving import run
    from bertology_serve.bench.serving.serving_report import check_suffix, write
    from bertology_serve.bench.serving.texts_workload import Workload

    check_suffix(output)
    if calibration is not None and calibration.suffix != ".json":
        raise SpecError(f"cannot write {calibration}: expected a name that ends in .json")
    work = Workload(sequences, deltas, seed=seed)
    with progress() as bar:
        task = bar.add_task("rounds", total=rounds)
        result = run(backbone, work, rounds, threads, lambda: bar.advance(task), engine)
    show(result)
    if output is not None:
        write(result.everything, output)
        note(f"written to {output}")
    if calibration is not None:
        from bertology_serve.files import write_json

        write_json(calibration, _calibrated(backbone, threads, engine))
        note(f"written to {calibration}: bertology-serve plan --calibration {calibration} --deltas ... --calls ...")
    missed = [one.bar.name for one in result.judged if one.verdict == "missed"]
    if check and missed:
        raise VerificationError(f"missed: {', '.join(missed)}")


def _calibrated(backbone: str, threads: int | None, engine: str) -> JsonObject:
    """What a server of those threads takes."""
    from bertology_serve.bench.prove.stage import Stage
    from bertology_serve.bench.serving.calibrate import calibrate

    environ = {"OMP_NUM_THREADS": str(threads)} if threads else None
    with tempfile.TemporaryDirectory() as directory:
        return calibrate(Stage(backbone, Path(directory), quick=True), 1.0, ("--engine", engine), environ)


def shown(ratio: float | None) -> str:
    """A ratio for people."""
    return "-" if ratio is None else f"{ratio:.2f}×"


def show(result: Result) -> None:
    """The two tables, times and bars, with what they were measured on."""
    facts: dict[str, Any] = result.everything
    where, tokens = facts["environment"], facts["workload"]["tokens"]
    rows = [
        (timed.name, 1e3 * timed.median, 1e3 * median(timed.cpu_seconds), round(tokens / timed.median))
        for timed in result.times
    ]
    title = f"{facts['workload']['sequences']} sequences, {tokens} tokens, {facts['workload']['deltas']} LoRA deltas"
    table(f"{title}, {facts['backbone']}", ("contender", "ms", "CPU ms", "tokens/s"), rows, stderr=False)
    bars = [(one.bar.name, shown(one.measured), shown(one.cpu), one.bar.promise, one.verdict) for one in result.judged]
    table("bars", ("ratio", "measured", "of CPU time", "promise", ""), bars, stderr=False)
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    note(f"{where['cpu']}, {where['threads']} of {where['cores']} cores, load {where['load_before']}; {versions}")
    note(f"{where['date']}; rounds: {len(result.times[0].seconds)}; ours runs on {where['engine']}")
    if result.missing:
        note(result.missing)


Rates = Annotated[str, typer.Option(help="Calls a second, with commas between.")]
Arrivals = Annotated[Literal["poisson", "bursty"], typer.Option(help="Bursty: eight at once on average.")]


@app.command()
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
        from bertology_serve.files import write_json

        write_json(output, everything)
    if plot is not None:
        draw(points, plot)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise SpecError(f"--rates is {text!r}; expected numbers with commas between") from None


@app.command()
def kernels(
    quick: Annotated[bool, typer.Option("--quick", help="Eight points instead of the whole sweep.")] = False,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write every figure there.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the ratios over T and deltas (PNG).")] = None,
    shapes: Annotated[str, typer.Option("--shapes", help="Only these, such as 768x768,768x3072 (K x N).")] = "",
    rows: Annotated[str, typer.Option("--rows", help="Only these T, such as 4096,16384.")] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    tune: Annotated[Path | None, typer.Option("--tune", help="Search configurations; write a table.")] = None,
    also: Annotated[str, typer.Option("--also", help="One more method, MODULE:FUNCTION; see bench_methods.")] = "",
) -> None:
    """Measure the kernels against cuBLAS and the ways that others take, on this machine's GPU.

    Prints time, ratio to cuBLAS alone, the floor under that ratio and the gap, losses included; then adapters and
    norms beside a copy of their rows. Without a CUDA GPU it says so and exits with 2.
    """
    sizes = [_shape(text) for text in _listed(shapes)]
    heights = [_number(text) for text in _listed(rows)]
    if dtype not in ("bfloat16", "float16", "float32"):
        raise SpecError(f"got --dtype {dtype}, expected bfloat16, float16 or float32")
    from bertology_serve.bench.kernels import kernel_plot, kernel_run

    device = kernel_run.cuda()
    kernel_plot.check(plot)
    if tune is not None:
        table = kernel_run.tune(
            device,
            lambda row: (
                (not sizes or (row.point.k, row.point.n) in sizes) and (not heights or row.point.rows in heights)
            ),
            note,
        )
        table.save(tune)
        note(f"wrote {tune}; commit it as kernels/tuning.{table.arch}.json")
        return
    _sweep(quick, csv, plot, sizes, heights, dtype, also)


def _sweep(
    quick: bool,
    csv: Path | None,
    plot: Path | None,
    sizes: list[tuple[int, int]],
    heights: list[int],
    dtype: str,
    also: str,
) -> None:
    import torch

    from bertology_serve.bench.kernels import kernel_plot, kernel_report, kernel_run, row_kernels
    from bertology_serve.bench.kernels.gpu_timing import machine
    from bertology_serve.bench.kernels.methods import BASELINE, OURS
    from bertology_serve.bench.kernels.workload import sweep

    device = kernel_run.cuda()
    about = machine(device)
    note(", ".join(f"{key} {value}" for key, value in about.items()))
    wanted = [
        w for w in sweep(quick, dtype) if (not sizes or (w.k, w.n) in sizes) and (not heights or w.rows in heights)
    ]
    if not wanted:
        raise SpecError("no point of the sweep has those --shapes and --rows; run with --quick to see some that it has")
    figures = []
    for found in kernel_run.measure(wanted, device, also):
        figures += found
        note(f"{len(figures)} figures: {found[0].workload}")
        if csv is not None:
            kernel_report.write_csv(csv, figures, about)
    print("\n".join([*kernel_report.lines(figures), *kernel_report.losses(figures, OURS, BASELINE)]))
    if plot is not None:
        kernel_plot.draw(figures, about, plot)
    if not sizes and not heights:
        print("\n".join(row_kernels.lines(row_kernels.measure(row_kernels.sweep(getattr(torch, dtype)), device))))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _shape(text: str) -> tuple[int, int]:
    k, _, n = text.partition("x")
    return _number(k), _number(n)


def _number(text: str) -> int:
    if not text.isdigit():
        raise SpecError(f"got {text!r}, expected a number; write --shapes 768x3072 --rows 4096,16384")
    return int(text)


MEGA = 2**20


@app.command()
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
        from bertology_serve.files import write_json

        write_json(output, everything)
    if plot is not None:
        draw(found, plot)
