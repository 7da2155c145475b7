"""``bertology-serve bench export``: the exported forms beside each other, torch, optimum and Olive."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bertology_serve.cli.common import note, table
from bertology_serve.cli.train import read_columns
from bertology_serve.errors import SpecError, VerificationError

if TYPE_CHECKING:
    from bertology_serve.deltas.delta import Delta
    from bertology_serve.encoder.encoder import Encoder


def export(
    delta: Annotated[Path | None, typer.Option(help="A delta that folds. Default: none, and a random head.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Encoder. Default: the delta's, or minilm.")] = None,
    data: Annotated[str | None, typer.Option(help="Labelled records: the delta's metric is measured on them.")] = None,
    texts: Annotated[str | None, typer.Option(help="Records to time. Default: --data, or built-in ones.")] = None,
    columns: Annotated[str | None, typer.Option(help="Where fields of both stand: text=sentence,label=y.")] = None,
    sequences: Annotated[int, typer.Option(help="How many of them, 32 a batch.", min=2)] = 128,
    optimum: Annotated[Path | None, typer.Option(help="A virtual environment that has optimum-onnx.")] = None,
    olive: Annotated[Path | None, typer.Option(help="A virtual environment that has olive-ai.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile takes part.")] = True,
    rounds: Annotated[int, typer.Option(help="How often each contender runs.", min=1)] = 9,
    threads: Annotated[int, typer.Option(help="Threads of torch and ONNX Runtime.", min=1)] = 1,
    output: Annotated[Path | None, typer.Option(help="Directory for export.md, export.csv and export.png.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with code 1 where a bar is missed.")] = False,
) -> None:
    """Time the exported forms, dense and unpadded, in fp32 and 8 bits, beside torch, optimum and Olive.

    All run the same merged weights on full batches of 8×128 and 32×64 and on texts as they come, in turns; what each
    costs in accuracy stands beside. optimum and Olive need environments of their own.
    """
    import torch

    from bertology_serve.bench.export.export_report import bars, costs, judge, speeds, write
    from bertology_serve.bench.export.export_run import run

    if data is not None and delta is None:
        raise SpecError("--data was given without --delta; a random head has no metric, so give the delta too")
    torch.set_num_threads(threads)
    loaded, encoder = _opened(delta, backbone)
    tools = {name: path for name, path in (("optimum", optimum), ("olive", olive)) if path is not None}
    chosen = _inputs(loaded, encoder, data, texts, columns, sequences, tools, compiled)
    result = run(encoder, loaded, chosen, rounds, note)
    for title, (head, rows) in (
        (f"{loaded.name} on {encoder.name}, processor time", speeds(result)),
        ("accuracy", costs(result)),
        ("bars", bars(judge(result))),
    ):
        table(title, head, rows, stderr=False)
    for line in (*result.missing, *(f"written to {path}" for path in (write(result, output) if output else ()))):
        note(line)
    missed = [one.name for one in judge(result) if one.verdict == "missed"]
    if check and missed:
        raise VerificationError(f"missed: {'; '.join(missed)}")


def _opened(delta: Path | None, backbone: str | None) -> tuple[Delta, Encoder]:
    from bertology_serve.bench.export.export_run import bare
    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.encoder.opening import open_delta

    if delta is not None:
        return open_delta(delta, backbone, "cpu")
    encoder = Encoder.load(backbone or "minilm")
    return bare(encoder), encoder


def _inputs(
    delta: Delta,
    encoder: Encoder,
    data: str | None,
    texts: str | None,
    columns: str | None,
    sequences: int,
    tools: dict[str, Path],
    compiled: bool,
) -> Any:
    from bertology_serve import examples
    from bertology_serve.bench.export.export_run import Inputs
    from bertology_serve.data.records import load_examples
    from bertology_serve.tasks.registry import task_for

    task, named = task_for(delta.task), read_columns(columns)
    timed = texts or data
    records = load_examples(
        timed or examples.path("sentiment", "dev"), task, named if timed else None, False, delta.columns
    )
    encodings = [one for record in records[:sequences] for one in task.encode(record, encoder.tokenizer)]
    gold = load_examples(data, task, named, remembered=delta.columns) if data is not None else []
    return Inputs(encodings, task, gold, tools, compiled)
