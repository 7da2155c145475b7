"""``bertology-serve bench cpu`` (``bench export`` before): ours beside what else runs an encoder on a CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bertology_serve.cli.common import load_library, note, table
from bertology_serve.cli.train import read_columns
from bertology_serve.errors import SpecError, Unsupported, VerificationError

if TYPE_CHECKING:
    from bertology_serve.bench.cpu.cpu_log import Log
    from bertology_serve.bench.cpu.subject import Inputs
    from bertology_serve.deltas.delta import Delta
    from bertology_serve.encoder.encoder import Encoder


def cpu(
    delta: Annotated[Path | None, typer.Option(help="A delta that folds. Default: none, and a random head.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Encoder. Default: the delta's, or minilm.")] = None,
    data: Annotated[str | None, typer.Option(help="Labelled records: the delta's metric is measured on them.")] = None,
    texts: Annotated[str | None, typer.Option(help="Records to time too. Default: those of --data.")] = None,
    columns: Annotated[str | None, typer.Option(help="Where fields of both stand: text=sentence,label=y.")] = None,
    sequences: Annotated[int, typer.Option(help="How many of them, 32 a batch.", min=2)] = 128,
    only: Annotated[
        str, typer.Option(help="Parts of contenders' and workloads' names, with semicolons between: openvino;8x128.")
    ] = "",
    again: Annotated[
        bool, typer.Option("--again", help="Measure what is chosen anew, also what --output has.")
    ] = False,
    make: Annotated[
        Path | None, typer.Option("--make-environments", help="Make the others' virtual environments there, and stop.")
    ] = None,
    environments: Annotated[Path | None, typer.Option(help="Where they lie. Default: only ours take part.")] = None,
    optimum: Annotated[Path | None, typer.Option(help="A virtual environment that has optimum-onnx.")] = None,
    olive: Annotated[Path | None, typer.Option(help="A virtual environment that has olive-ai.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile takes part.")] = False,
    rounds: Annotated[int, typer.Option(help="How often each contender runs.", min=1)] = 9,
    threads: Annotated[int, typer.Option(help="Threads and cores of each contender.", min=1)] = 1,
    output: Annotated[
        Path | None, typer.Option(help="Directory for results, by processor; what it has is not measured again.")
    ] = None,
    render: Annotated[bool, typer.Option("--render", help="Only write tables and plots of what --output has.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with code 1 where a bar is missed.")] = False,
) -> None:
    """Time this package beside OpenVINO, CTranslate2, ONNX Runtime, torch, peft and others, one model and mixed deltas.

    Each contender is a process of its own on the same weights and batches; they take turns. What each costs in
    accuracy and memory stands beside. The others' environments are made by --make-environments DIR.
    """
    if make is not None:
        _make(make)
        return
    if render:
        _render(output)
        return
    if data is not None and delta is None:
        raise SpecError("--data was given without --delta; a random head has no metric, so give the delta too")
    load_library(deltas=[delta], data=[data, texts], backbone=backbone)
    import torch

    from bertology_serve.bench.cpu.contenders import ENVIRONMENTS, choose
    from bertology_serve.bench.cpu.cpu_report import judge
    from bertology_serve.bench.cpu.cpu_run import Plan, run
    from bertology_serve.bench.cpu.subject import WORKLOADS

    places = {name: environments / name for name in ENVIRONMENTS} if environments is not None else {}
    places |= {name: path for name, path in (("optimum", optimum), ("olive", olive)) if path is not None}
    plan = Plan(choose(only, WORKLOADS, compiled), rounds, threads, again, places)
    torch.set_num_threads(threads)
    loaded, encoder = _opened(delta, backbone)
    inputs = _inputs(loaded, encoder, data, texts, columns, sequences)
    with tempfile.TemporaryDirectory() as temporary:
        work = (environments or Path(temporary)) / "work" / Path(encoder.name).name / loaded.name
        log = run(encoder, loaded, inputs, plan, work, output or Path(temporary) / "results", note)
        _show(log)
    if output is not None:
        _render(output)
    missed = [one.name for one in judge(log) if one.verdict == "missed"]
    if check and missed:
        raise VerificationError(f"missed: {'; '.join(missed)}")


def _make(directory: Path) -> None:
    from bertology_serve.bench.cpu.contenders import make_environments

    failed = make_environments(directory, note)
    note(f"now: bertology-serve bench cpu --environments {directory} --output DIR")
    if failed:
        raise Unsupported("; ".join(f"{name} was not made: {why}" for name, why in failed.items()))


def _show(log: Log) -> None:
    from bertology_serve.bench.cpu.cpu_report import header, missing, tables

    for title, (head, rows) in tables(log):
        table(title, head, rows, stderr=False)
    for line in (header(log), *(f"missing: {one}" for one in missing(log))):
        note(line)


def _render(output: Path | None) -> None:
    from bertology_serve.bench.cpu.cpu_log import logs
    from bertology_serve.bench.cpu.cpu_report import index, write

    if output is None or not output.is_dir():
        raise SpecError(
            f"--render has nothing to read: got --output {output}, expected the directory of an earlier run"
        )
    files = [path for log in logs(path for path in output.iterdir() if path.is_dir()) for path in write(log)]
    note(f"written: {', '.join(map(str, (*files, index(output))))}")


def _opened(delta: Path | None, backbone: str | None) -> tuple[Delta, Encoder]:
    from bertology_serve.bench.cpu.subject import bare
    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.encoder.opening import open_delta

    if delta is not None:
        return open_delta(delta, backbone, "cpu")
    encoder = Encoder.load(backbone or "minilm")
    return bare(encoder), encoder


def _inputs(
    delta: Delta, encoder: Encoder, data: str | None, texts: str | None, columns: str | None, sequences: int
) -> Inputs:
    from bertology_serve.bench.cpu.subject import Inputs
    from bertology_serve.data.records import load_examples
    from bertology_serve.tasks.registry import task_for

    task, named, timed = task_for(delta.task), read_columns(columns), texts or data
    records = load_examples(timed, task, named, False, delta.columns)[:sequences] if timed else []
    encodings = [one for record in records for one in task.encode(record, encoder.tokenizer)]
    gold = load_examples(data, task, named, remembered=delta.columns) if data is not None else []
    return Inputs(encodings, task, gold)
