"""``bertology-serve convert``: checkpoints of other libraries as deltas, and bottleneck adapters for AdapterHub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bertology_serve.cli.common import load_library, note, note_next
from bertology_serve.cli.options import listed
from bertology_serve.errors import InputError, NotFound, SpecError


def convert(
    source: Annotated[
        Path, typer.Argument(help="Directory of AdapterHub, peft or a whole task model, or a microsoft/LoRA file.")
    ],
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    to: Annotated[Literal["delta", "adapterhub"], typer.Option(help="adapterhub: from a delta of this package.")] = (
        "delta"
    ),
    backbone: Annotated[
        str | None, typer.Option(help="The encoder that it was made for: foreign files name no weights.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The delta's name. Default: that of --out.")] = None,
    alpha: Annotated[float | None, typer.Option(help="microsoft/LoRA: updates are scaled by alpha / rank.")] = None,
    labels: Annotated[str | None, typer.Option(help="Labels in logit order, with commas.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longest sequence in tokens. Default: the checkpoint's, at most 128.", min=3)
    ] = None,
    task: Annotated[str | None, typer.Option(help="The kind of the task, where peft's task_type names none.")] = None,
) -> None:
    """Convert an adapter; pickles are opened here only, and for tensors only."""
    if not source.exists():
        raise NotFound(f"no file or directory {source}; expected a checkpoint")
    load_library(backbone=backbone)
    from bertology_serve.deltas import store
    from bertology_serve.deltas.catalog import newest
    from bertology_serve.deltas.interop.adapterhub import write_adapterhub
    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.training.convert import ConvertOptions
    from bertology_serve.training.convert import convert as run
    from bertology_serve.training.run_directory import Destination

    if out.exists():
        raise InputError(f"{out} exists; choose another --out")
    if to == "adapterhub":
        delta = store.load(newest(source))
        write_adapterhub(delta, out, Encoder.load(backbone or delta.base.name).anatomy)
        note(f"saved to {out}; next: model.load_adapter({str(out)!r}, use_safetensors=True)")
        return
    if backbone is None:
        raise SpecError("no --backbone was given; name the encoder that the checkpoint was made for")
    called, encoder = Destination(out, name).open()[0], Encoder.load(backbone)
    made = run(source, encoder, called, ConvertOptions(alpha, listed(labels) or (), max_length, task))
    made.save(out, encoder)
    if "verified" in made.provenance:
        note(f"verified {made.provenance['verified']}")
    note(f"saved to {out}; next:")
    note_next(["evaluate", out, "--backbone", backbone, "--input", "FILE"])
