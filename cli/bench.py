"""``bertology-serve bench``: what this machine does, beside the alternatives."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bertology_serve.cli.bench_alternatives import alternatives
from bertology_serve.cli.bench_cpu import cpu
from bertology_serve.cli.bench_kernels import kernels
from bertology_serve.cli.bench_load import load
from bertology_serve.cli.common import load_library, note, progress, table
from bertology_serve.errors import VerificationError

if TYPE_CHECKING:
    from bertology_serve.bench.serving.serving import Result

app = typer.Typer(help="Measure speed on this machine, beside the alternatives.", rich_markup_mode=None)


@app.callback()
def _bench() -> None:
    """Measure speed on this machine, beside the alternatives."""


app.command()(kernels)
app.command()(cpu)
app.command("export", hidden=True)(cpu)
app.command()(load)
app.command()(alternatives)


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
) -> None:
    """Time one mixed batch: this engine, itself without deltas, and peft's adapter_names (where peft is installed).

    Lengths are lognormal, mean 24 tokens, at most 128. Contenders take turns; ratios are medians over the rounds.
    """
    load_library(backbone=backbone)
    from bertology_serve.bench.serving.serving import run
    from bertology_serve.bench.serving.serving_report import check_suffix, write
    from bertology_serve.bench.serving.texts_workload import Workload

    check_suffix(output)
    work = Workload(sequences, deltas, seed=seed)
    with progress() as bar:
        task = bar.add_task("rounds", total=rounds)
        result = run(backbone, work, rounds, threads, lambda: bar.advance(task), engine)
    show(result)
    if output is not None:
        write(result.everything, output)
        note(f"written to {output}")
    missed = [one.bar.name for one in result.judged if one.verdict == "missed"]
    if check and missed:
        raise VerificationError(f"missed: {', '.join(missed)}")


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
