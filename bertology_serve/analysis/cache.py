"""Reports that stand already: an analysis of the same content with the same settings is read back, not run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bertology_serve import __version__
from bertology_serve.analysis.report import Report
from bertology_serve.analysis.subject import Subject
from bertology_serve.encoder.encoder import weights_hash

KEY = "content"  # the fact that holds the key


def content_key(name: str, subjects: Sequence[Subject], files: Sequence[str | Path | None], *settings: Any) -> str:
    """SHA-256 (hex) of all that a report follows from: this version, weights, deltas, the files' bytes, settings.

    A name that is no file (``hub:...``, a word) counts as itself.
    """
    digest = hashlib.sha256(f"{__version__} {name}".encode())
    for subject in subjects:
        delta = subject.delta
        digest.update(subject.encoder.ref.sha256.encode())
        if delta is not None:
            digest.update(repr((delta.name, delta.version, delta.specs, delta.task)).encode())
            for tensors in (delta.tensors, delta.head):
                digest.update(weights_hash(tensors).encode())
    for file in files:
        path = None if file is None else Path(file)
        there = path is not None and path.is_file()
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path and there else repr(file).encode())
    digest.update(repr(settings).encode())
    return digest.hexdigest()


def remembered(
    folder: Path, name: str, key: str, make: Callable[[], Report], again: bool = False
) -> tuple[Report, bool]:
    """The report that lies in a folder if its key is this one, else (or ``again``) a new one; whether it lay there."""
    file = folder / f"{name}.json"
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        if held["facts"][KEY] == key and not again:
            return Report.from_dict(held), True
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no report, or none of ours: it is made
    report = make()
    return replace(report, facts={**report.facts, KEY: key}), False
