"""``bertology-serve pull``: a delta from the HuggingFace hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bertology_serve.cli.common import note, note_next


def pull(
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    out: Annotated[Path, typer.Option(help="The delta's directory.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: main.")] = None,
) -> None:
    """Download a delta; nothing appears unless all of it is there and sound."""
    from bertology_serve.deltas.hub import pull as run

    note(f"saved to {run(repository, out, revision=revision)}; next:")
    note_next(["inspect", out])
