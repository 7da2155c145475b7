"""Where an export may be written."""

from __future__ import annotations

from pathlib import Path

from bertology_serve.errors import SpecError
from bertology_serve.export.layout import REPORT
from bertology_serve.export.spec import MODEL


def check_target(target: Path, overwrite: bool) -> None:
    """Raises SpecError where ``target`` may not be written: only an earlier export is ever replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / REPORT).is_file() or not any((target / path).is_file() for path in MODEL.values()):
        raise SpecError(f"{target} exists and is no export; give --out a new directory")
    if not overwrite:
        raise SpecError(f"{target} holds an export already; give --overwrite to replace it, or another --out")
