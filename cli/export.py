"""``bertology-serve export``: a delta and its encoder as one verified directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bertology_serve.cli.common import load_library, note
from bertology_serve.cli.options import options
from bertology_serve.errors import SpecError
from bertology_serve.export.export_spec import ExportSpec

if TYPE_CHECKING:
    from bertology_serve.deltas.delta import Delta
    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.export.exporting import Exported
    from bertology_serve.tasks.spec import Encoding


@options(ExportSpec, into="spec")
def export(
    delta: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="A delta's directory, or one with its versions; see --multi.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write, published only when the verification agrees.")],
    spec: ExportSpec,
    backbone: Annotated[str | None, typer.Option(help="Encoder. Default: the one that the delta names.")] = None,
    name: Annotated[str | None, typer.Option(help="What the model calls itself. Default: the delta's name.")] = None,
    multi: Annotated[
        bool, typer.Option("--multi", help="One graph for all the deltas; each row names its own.")
    ] = False,
    join: Annotated[
        bool, typer.Option("--join", help="With --multi: into the export that --out is; its graph stays the same file.")
    ] = False,
    verify: Annotated[
        str | None, typer.Option(help="Records to verify with, beside the built-in sentences: .jsonl, .csv ...")
    ] = None,
    calibrate: Annotated[
        str | None, typer.Option(help="Records that int8-static takes its scales from. Default: built-in sentences.")
    ] = None,
) -> None:
    """Export a delta with its encoder to ONNX or OpenVINO, run it there against torch, publish it if they agree.

    With --merge LoRA and BitFit are folded into the weights; without it the delta stays apart in the graph, as
    initialisers called delta.NAME.SLOT.LAYER. BERT, RoBERTa, DistilBERT, ELECTRA, MPNet, DeBERTa and ModernBERT are
    written straight from their weights, and padding costs no work; other encoders go through torch's exporter. With
    --layout triton, --out is REPOSITORY/NAME.

    With --multi many deltas share one graph: their tensors lie beside it and are its inputs, each row of a batch names
    its delta by number, and with --join further deltas come into an export without a new graph.
    """
    if calibrate and spec.precision != "int8-static":
        raise SpecError(f"--calibrate is for --precision int8-static, got {spec.precision}; leave it out")
    load_library(deltas=delta, data=[verify, calibrate], backbone=backbone)
    if multi:
        done = _many(delta, out, spec, backbone, name, verify, join)
    elif len(delta) > 1 or join:
        raise SpecError(f"got {len(delta)} deltas{' and --join' * join}; one graph for several of them is --multi")
    else:
        done = _one(delta[0], out, spec, backbone, name, verify, calibrate)
    note(done.report.line())
    for caution in done.cautions:
        note(f"warning: {caution}")
    note(
        f"{out}: {done.bytes / 1e6:,.1f} MB, exported in {done.export_seconds:.1f} s, "
        f"verified in {done.verify_seconds:.1f} s; to run it:"
    )
    print(done.example)


def _one(
    delta: Path,
    out: Path,
    spec: ExportSpec,
    backbone: str | None,
    name: str | None,
    verify: str | None,
    calibrate: str | None,
) -> Exported:
    from bertology_serve.encoder.opening import open_delta
    from bertology_serve.export.exporting import export_delta

    loaded, encoder = open_delta(delta, backbone, "cpu")
    records, texts = (_encoded(path, loaded, encoder) if path else [] for path in (verify, calibrate))
    return export_delta(encoder, loaded, out, spec, name=name, records=records, calibrate=texts)


def _many(
    paths: list[Path],
    out: Path,
    spec: ExportSpec,
    backbone: str | None,
    name: str | None,
    verify: str | None,
    into: bool,
) -> Exported:
    from bertology_serve.deltas import store
    from bertology_serve.encoder.opening import load_delta, open_delta
    from bertology_serve.export.exporting import export_many, join

    found = [versions[-1] for path in paths for versions in store.discover(path).values()]
    path, called = (found[0].path, found[0].name) if found else (paths[0], None)
    first, encoder = open_delta(path, backbone, "cpu", called)
    deltas = [first, *(load_delta(one.path, encoder, one.name) for one in found[1:])]
    if into:
        return join(encoder, deltas, out, spec)
    records = _encoded(verify, first, encoder) if verify else []
    return export_many(encoder, deltas, out, spec, name=name or out.name, records=records)


def _encoded(path: str, delta: Delta, encoder: Encoder) -> list[list[Encoding]]:
    from bertology_serve.data.records import load_examples
    from bertology_serve.tasks.registry import task_for

    task = task_for(delta.task)
    return [task.encode(example, encoder.tokenizer) for example in load_examples(path, task, labelled=False)]
