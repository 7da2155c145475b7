"""``bertology-serve compress``: a fully tuned model as a small delta that shares the backbone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bertology_serve.cli.common import load_library, note, note_next, table
from bertology_serve.cli.train import read_columns

if TYPE_CHECKING:
    from bertology_serve.deltas.delta import Delta
    from bertology_serve.training.compress import Compressed

MOST_DROPPED = 5


def compress(
    delta: Annotated[
        Path, typer.Argument(metavar="DIR", help="A whole checkpoint's directory (full, top-k, HuggingFace's).")
    ],
    out: Annotated[Path, typer.Option(help="The small delta's directory.")],
    rank: Annotated[int | None, typer.Option(help="Rank of each linear's update.")] = None,
    energy: Annotated[float | None, typer.Option(help="Least share of the differences' energy to keep.")] = None,
    share: Annotated[
        float | None, typer.Option(help="Share of the differences' entries to keep, the largest: a sparse delta.")
    ] = None,
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="With --share: of each linear's entries, not of all.")
    ] = False,
    eval: Annotated[str | None, typer.Option(help="Labelled records to measure both on.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Where fields stand: text=sentence,label=y. Default: as in training.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="The base. Default: the one that the delta names.")] = None,
    name: Annotated[str | None, typer.Option(help="The small delta's name. Default: that of --out.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Write what full fine-tuning changed as a low-rank or sparse delta, and measure what that costs."""
    load_library(deltas=[delta], data=[eval], backbone=backbone, device=device)
    from bertology_serve.data.records import read_records
    from bertology_serve.deltas import store
    from bertology_serve.deltas.catalog import newest
    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.encoder.loading import find_device
    from bertology_serve.encoder.opening import is_task_model, read_task_model
    from bertology_serve.errors import InputError, SpecError
    from bertology_serve.training.compress import Budget
    from bertology_serve.training.compress import compress as run
    from bertology_serve.training.evaluation import evaluate
    from bertology_serve.training.run_directory import Destination

    budget, called = Budget(rank, energy, share, per_tensor), Destination(out, name).open()[0]
    if out.exists():
        raise InputError(f"{out} exists; choose another --out")
    place, path = find_device(device), newest(delta)
    if is_task_model(path):
        if backbone is None:
            raise SpecError(f"{delta} does not say what it was tuned from; give --backbone")
        encoder = Encoder.load(backbone, device=place)
        whole = read_task_model(path, encoder)
    else:
        whole = store.load(path)
        encoder = Encoder.load(backbone or whole.base.name, device=place)
    records = read_records(eval, read_columns(columns), whole.columns) if eval else []
    found = run(whole, encoder, budget, called)
    measured: dict[str, tuple[float, float]] = {}
    if records:
        before = evaluate(whole, records, Encoder.for_delta(whole, backbone, device=place)).metrics
        after = evaluate(found.delta, records, encoder).metrics
        measured = {metric: (before[metric], after[metric]) for metric in before}
    small = replace(found.delta, metrics={metric: after for metric, (_, after) in measured.items()})
    small.save(out, encoder)
    show(whole, small, found, measured, as_json)
    note(f"saved to {out}; it shares the backbone now:")
    note_next(["serve", "--backbone", encoder.name, "--deltas", out])


def show(
    whole: Delta, small: Delta, found: Compressed, measured: dict[str, tuple[float, float]], as_json: bool
) -> None:
    """Size, energy, metrics, and what was dropped."""
    if as_json:
        facts = {"delta": small.name, "rank": found.rank, "bytes": [whole.bytes, small.bytes], "kept": found.kept}
        return print(json.dumps({**facts, "dropped": found.dropped, "metrics": measured}))
    rows: list[list[object]] = [
        ["kind", "full", " + ".join(small.kinds)],
        ["bytes", f"{whole.bytes:,}", f"{small.bytes:,}"],
    ]
    rows += [[metric, f"{before:.4f}", f"{after:.4f}"] for metric, (before, after) in measured.items()]
    table(f"{whole.name} as rank {found.rank}", ["", "whole", "compressed"], rows, stderr=False)
    kept = [[layer, f"{share:.4f}"] for layer, share in found.kept.items()]
    table("energy kept", ["layer", "share"], kept, stderr=False)
    largest = sorted(found.dropped.items(), key=lambda item: -item[1])[:MOST_DROPPED]
    if largest:
        more = f", of {len(found.dropped)}" if len(found.dropped) > MOST_DROPPED else ""
        table(f"dropped: the largest{more}", ["weight", "norm of its change"], largest, stderr=False)
