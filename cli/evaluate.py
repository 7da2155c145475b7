"""``bertology-serve evaluate``: a delta's metrics on a file of records."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bertology_serve.cli.common import note, progress, table, truncation
from bertology_serve.cli.train import read_columns

if TYPE_CHECKING:
    from bertology_serve.data.official import Answers, Records


def evaluate(
    delta: Annotated[Path, typer.Argument(metavar="DIR", help="A delta's directory, or one with its versions.")],
    input: Annotated[str, typer.Option(help="Labelled records: .jsonl, .csv, .tsv (also .gz), .parquet, or hub:NAME.")],
    backbone: Annotated[str | None, typer.Option(help="Encoder. Default: the one that the delta names.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Where fields stand: text=sentence,label=y. Default: as in training.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens a batch.", min=1)] = 4096,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Measure a delta on labelled records, through the engine that serves it."""
    from bertology_serve.data.records import read_records
    from bertology_serve.encoder.loading import find_device
    from bertology_serve.encoder.opening import open_delta
    from bertology_serve.training.evaluate import evaluate as run

    loaded, encoder = open_delta(delta, backbone, find_device(device))
    records = read_records(input, read_columns(columns), loaded.columns)
    started = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("evaluate", total=len(records))
        found = run(loaded, records, encoder, max_tokens, advance=lambda count: bar.advance(task, count))
    seconds = time.perf_counter() - started
    metrics = {**official(input, found.metrics, found.answers, records), **found.metrics}
    if as_json:
        facts = {"delta": loaded.name, "version": loaded.version, "task": loaded.task.kind, "rows": len(records)}
        facts["truncated"] = found.truncated
        return print(json.dumps({**facts, "metrics": metrics, "seconds": round(seconds, 3)}))
    rows = [(name, f"{value:.4f}") for name, value in metrics.items()]
    table(f"{loaded.name} {loaded.version} on {input}", [loaded.task.kind, "value"], rows, stderr=False)
    note(f"{len(records):,} records in {seconds:.1f} s")
    if found.truncated:
        note(truncation(found.truncated, len(records)))


def official(input: str, metrics: Mapping[str, float], answers: Answers, records: Records) -> dict[str, float]:
    """The official metrics where the records are of a known set; they stand first."""
    from bertology_serve.data.official import official_metrics
    from bertology_serve.data.set_files import PREFIX, find_set, parse

    return official_metrics(find_set(parse(input)[0]), metrics, answers, records) if input.startswith(PREFIX) else {}
