"""The layout ``web`` of an export for many: a file for each delta, and a manifest that says what a browser must know.

A browser fetches the graph once, and a delta's file when that delta is first asked. A file holds the arrays of a
library of one delta without what the graph's inputs say already: the row of zeros at the head of every stack, and all
of the places that the delta leaves alone. What the base checkpoint has of a head (BERT's pooler) lies beside the graph,
once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as as_bytes

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import FormatError, Unsupported
from bertology_serve.export.delta_library import (
    AGAIN,
    Library,
    LibraryCard,
    base_of,
    borrows_dense,
    is_stack,
    library_of_one,
    read_card,
)
from bertology_serve.export.emitter.delta_inputs import Arrays
from bertology_serve.export.export_directory import DATA_SUFFIX
from bertology_serve.export.export_spec import MODEL
from bertology_serve.files import JsonObject, write_json

MANIFEST, FORMAT = "manifest.json", "bertology-serve-web/1"
HEAD = "onnx/head.safetensors"
OF_TASK = ("labels", "thresholds")
"""What of a card a task's fields say already."""


def save(directory: Path, encoder: Encoder, deltas: Sequence[Delta]) -> None:
    """Writes the files of deltas and the manifest, in which they stand behind those that are there.

    Raises what ``library_of`` raises, and Unsupported for a graph whose weights are a file of their own and for texts
    that are cut from their start.
    """
    if encoder.tokenizer.truncation_side == "left":
        raise Unsupported(
            f"the tokenizer of {encoder.name} cuts texts from their start (truncation_side), which the web package "
            "does not; leave out --layout web"
        )
    model = directory / MODEL["web"]
    if model.with_name(model.name + DATA_SUFFIX).exists():
        raise Unsupported("this encoder has more than 1.8 GB, which no browser tab holds; leave out --layout web")
    if (directory / MANIFEST).exists():
        manifest = _manifest(directory)
    else:
        manifest = {"format": FORMAT, "files": {MODEL["web"]: _told(model.read_bytes())}, "deltas": []}
        deltas = [base_of(encoder), *deltas]
    (directory / "deltas").mkdir(exist_ok=True)
    for delta in deltas:
        library, own = library_of_one(encoder, delta), f"deltas/{delta.name}.safetensors"
        parts = {own: _own(library.arrays)}
        if borrows_dense(encoder, delta):
            dense = [name for name in parts[own] if name.startswith(("head.dense", "head.norm"))]
            parts[HEAD] = {name: parts[own].pop(name) for name in dense}
        for path, arrays in parts.items():
            content = as_bytes(arrays)
            (directory / path).write_bytes(content)
            manifest["files"][path] = _told(content)
        card = {name: value for name, value in asdict(library.cards[0]).items() if name not in OF_TASK}
        manifest["deltas"].append(card | {"task": asdict(delta.task), "files": list(parts)})
    write_json(directory / MANIFEST, manifest)


def load(directory: Path, encoder: Encoder) -> Library:
    """All deltas that ``save`` wrote, joined; FormatError where it is something else."""
    blank = library_of_one(encoder, base_of(encoder)).arrays
    try:
        libraries = [
            Library(_whole(directory, card["files"], blank), (_card(card),)) for card in _manifest(directory)["deltas"]
        ]
        return reduce(Library.join, libraries)
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as problem:
        raise FormatError(f"{directory.name} has no deltas for the web ({problem}); {AGAIN}") from None


def _told(content: bytes) -> JsonObject:
    """What the manifest says of a file: browsers check both, and fetch it anew where the second has changed."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _manifest(directory: Path) -> JsonObject:
    found: JsonObject = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    if found.get("format") != FORMAT:
        raise FormatError(f"{MANIFEST} has format {str(found.get('format'))[:40]}; expected {FORMAT}: {AGAIN}")
    return found


def _card(card: JsonObject) -> LibraryCard:
    own = {name: value for name, value in card.items() if name != "files"}
    return read_card(own | {"task": card["task"]["kind"]} | {name: card["task"][name] for name in OF_TASK})


def _own(arrays: Arrays) -> Arrays:
    """What a file holds of a library of one delta."""
    rows = {name: _below(name, array) for name, array in arrays.items() if array.dtype == np.float32}
    rows = {name: np.ascontiguousarray(array) for name, array in sorted(rows.items()) if array.size}
    places = {name.rpartition(".")[0] for name in rows} | {"head"}
    tables = {name: array for name, array in sorted(arrays.items()) if array.dtype != np.float32 and array.size}
    return rows | {name: array for name, array in tables.items() if name.rpartition(".")[0] in places}


def _below(name: str, array: np.ndarray) -> np.ndarray:
    return array[:, 1:] if is_stack(name, array) else array[1:]


def _whole(directory: Path, files: Sequence[str], blank: Arrays) -> Arrays:
    """The arrays of a library of one delta; ``blank`` are those of one that changes nothing."""
    own = {name: array for path in files for name, array in load_file(directory / path).items()}
    found: Arrays = {}
    for name, array in blank.items():
        if array.dtype != np.float32:
            found[name] = own.get(name, array)
            continue
        zeros = array[:, :1] if is_stack(name, array) else array[:1]
        rows = own.get(name, _below(name, zeros))
        if name in ("head.out", "head.out_bias"):  # as wide as the delta has labels
            zeros = np.zeros((1, *rows.shape[1:]), np.float32)
        found[name] = np.concatenate([zeros, rows], int(is_stack(name, array)))
    return found
