"""``bertology-serve doctor``: what is wrong with this installation, one line each."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from bertology_serve.cli.common import load_library

BROKEN = 1


def doctor(
    backbone: Annotated[
        str | None, typer.Option(help="Load this encoder, and say whether its rows are packed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Look at versions, ONNX Runtime, CUDA and Triton; say how to mend what is wrong. Exit code 1 if something is."""
    load_library(backbone=backbone)
    from bertology_serve.export.installation import findings, look, of_encoder

    found = findings(look())
    if backbone is not None:
        from bertology_serve.encoder.encoder import Encoder

        found.append(of_encoder(Encoder.load(backbone)))
    print(json.dumps([asdict(one) for one in found], indent=2) if as_json else "\n".join(one.line() for one in found))
    if any(one.state == "broken" for one in found):
        raise typer.Exit(BROKEN)
