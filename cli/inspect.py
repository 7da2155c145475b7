"""``bertology-serve inspect``: what a delta's directory holds, every byte of it checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bertology_serve.cli.common import load_library, table


def inspect(
    delta: Annotated[Path, typer.Argument(metavar="DIR", help="A delta's directory, or one with several.")],
    backbone: Annotated[
        str | None, typer.Option(help="Check against this encoder too; peft's directories need it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show and validate a delta; of a directory with several deltas, each of them."""
    load_library(deltas=[delta], backbone=backbone)
    from bertology_serve.deltas.catalog import discover, is_delta
    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.encoder.opening import load_delta
    from bertology_serve.errors import NotFound
    from bertology_serve.training.publish import describe

    alone = is_delta(delta) or not delta.is_dir()
    places = [] if alone else [one for versions in discover(delta).values() for one in versions]
    if not alone and not places:
        raise NotFound(f"no delta in {delta}; expected a directory with delta.json, or NAME/VERSION/ below it")
    encoder = Encoder.load(backbone) if backbone else None
    known = [(one.path, one.name) for one in places] if places else [(delta, None)]
    found = [describe(path, load_delta(path, encoder, name)) for path, name in known]
    if as_json:
        return print(json.dumps(found[0] if alone else found, indent=2))
    for facts in found:
        table(f"{facts['name']} {facts['version']}", ["", "value"], _rows(facts), stderr=False)


def _rows(facts: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as lines of a table; what was left at ``None`` or is empty is left out."""
    for name, value in facts.items():
        label = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from _rows(value, f"{label}.")
        elif value is None or value in ("", [], ()):
            continue
        elif isinstance(value, (list, tuple)):
            yield label, _shortened(value)
        else:
            yield label, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _shortened(values: Sequence[Any], most: int = 12) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    whole = [one for one in values if isinstance(one, (list, tuple)) and len(one) > most]
    return f"{len(whole)} times {len(whole[0])}" if whole else ", ".join(map(str, values[:most])) + more


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
