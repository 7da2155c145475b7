"""``bertology-serve push`` and ``pull``: a delta to the HuggingFace hub, and from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bertology_serve.cli.common import load_library, note, note_next


def push(
    delta: Annotated[Path, typer.Argument(metavar="DIR", help="A delta's directory, or one with its versions.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made where it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to write to. Default: main.")] = None,
) -> None:
    """Upload a delta; who does it is what the hub's login or HF_TOKEN says."""
    load_library(deltas=[delta])
    from bertology_serve.deltas.catalog import newest
    from bertology_serve.deltas.hub import push as run

    note(f"uploaded: {run(newest(delta), repository, private=private, revision=revision)}")
    note_next(["pull", repository, "--out", "DIR"])


def pull(
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    out: Annotated[Path, typer.Option(help="The delta's directory.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: main.")] = None,
) -> None:
    """Download a delta; nothing appears unless all of it is there and sound."""
    from bertology_serve.deltas.hub import pull as run

    note(f"saved to {run(repository, out, revision=revision)}; next:")
    note_next(["inspect", out])
