"""``delta.json``, the truth about a delta: everything but its tensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from bertology_serve.deltas import anatomy_record
from bertology_serve.deltas.delta import BaseRef
from bertology_serve.deltas.names import ADAPTER_WEIGHTS, FULL_WEIGHTS, MANIFEST, check_name
from bertology_serve.deltas.typed import as_object, build, check_keys, conform
from bertology_serve.errors import FormatError
from bertology_serve.kinds.kinds import KINDS, kind_of
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.spec import TaskSpec

FORMAT = 1
Shapes = Mapping[str, tuple[int, ...]]
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """What a file of the directory must be: its size and SHA-256 (hex)."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """``delta.json`` in memory. ``tensors`` and ``head`` are shapes by name, as in the delta's memory form."""

    name: str
    base: BaseRef
    task: TaskSpec
    specs: tuple[Any, ...]
    anatomy: Anatomy
    tensors: Shapes
    head: Shapes
    files: Mapping[str, FileRecord]
    metrics: Mapping[str, float]
    provenance: Mapping[str, Any]


def to_json(manifest: Manifest) -> bytes:
    """The file's bytes; raises FormatError where metrics or provenance hold what JSON cannot."""
    values = {
        "format": FORMAT,
        "name": manifest.name,
        "base": asdict(manifest.base),
        "task": _task_record(manifest.task),
        "kinds": kinds_record(manifest.specs),
        "tensors": {name: list(shape) for name, shape in manifest.tensors.items()},
        "head": {name: list(shape) for name, shape in manifest.head.items()},
        "files": {name: asdict(file) for name, file in manifest.files.items()},
        "metrics": metrics_record(manifest.metrics),
        "provenance": dict(manifest.provenance),
        "anatomy": anatomy_record.record(manifest.anatomy),
    }
    try:
        text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{MANIFEST} cannot hold the provenance: {error}; keep it to plain JSON values") from None
    return (_LIST_OF_NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n").encode()


def _task_record(task: TaskSpec) -> dict[str, Any]:
    """The task's fields; those that earlier versions do not know only where they say something.

    So those read all deltas that they answer rightly, and refuse the others for an unknown field.
    """
    return {name: value for name, value in asdict(task).items() if name not in LATER or value}


LATER = ("thresholds", "abstain")

# A list of numbers on lines of its own, which then goes on one line. Strings hold no line breaks in JSON.
_LIST_OF_NUMBERS = re.compile(r"(?<=\[)\n(?:\s*-?[\d.e+-]+,?\n)+\s*(?=\])")


def from_json(values: Mapping[str, Any], where: str) -> Manifest:
    """The manifest that ``values`` hold; raises FormatError naming the field, what it is and what it should be."""
    if values.get("format") != FORMAT:
        got = str(values.get("format"))[:40]
        raise FormatError(f"{where} has format {got}; expected {FORMAT}: upgrade, or save the delta again")
    known = {field.name: field for field in fields(Manifest) if field.name != "specs"} | {"format": None, "kinds": None}
    check_keys(values, known, where)
    lacking = sorted(known.keys() - values.keys())
    if lacking:
        raise FormatError(f"{where} lacks the field {lacking[0]!r}; save the delta again")
    base = build(BaseRef, values["base"], f"{where}: base")
    return Manifest(
        name=check_name(values["name"], f"{where}: name"),
        base=base,
        task=build(TaskSpec, values["task"], f"{where}: task"),
        specs=specs_of(values["kinds"], where),
        anatomy=anatomy_record.restore(values["anatomy"], base.family, f"{where}: anatomy"),
        tensors=_shapes(values["tensors"], f"{where}: tensors"),
        head=_shapes(values["head"], f"{where}: head"),
        files=_files(values["files"], where),
        metrics=metrics_of(values["metrics"], f"{where}: metrics"),
        provenance=as_object(values["provenance"], f"{where}: provenance"),
    )


def kinds_record(specs: Sequence[Any]) -> dict[str, Any]:
    """The kinds' specs by the kinds' names, as plain values."""
    return {kind_of(spec).name: asdict(spec) for spec in specs}


def specs_of(values: object, where: str) -> tuple[Any, ...]:
    """The specs that ``kinds_record`` wrote; raises FormatError."""
    table = as_object(values, f"{where}: kinds")
    check_keys(table, KINDS, f"{where}: kinds")
    return tuple(build(KINDS[name].spec, spec, f"{where}: kinds.{name}") for name, spec in table.items())


def _shapes(values: object, where: str) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, shape in as_object(values, where).items():
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
            raise FormatError(f"{where}.{name[:80]} is {str(shape)[:60]}; expected a shape such as [2, 384]")
        shapes[name] = tuple(shape)
    return shapes


def _files(values: object, where: str) -> dict[str, FileRecord]:
    table = as_object(values, f"{where}: files")
    check_keys(table, {ADAPTER_WEIGHTS: None, FULL_WEIGHTS: None}, f"{where}: files")
    if ADAPTER_WEIGHTS not in table:
        raise FormatError(f"{where}: files lacks {ADAPTER_WEIGHTS!r}; save the delta again")
    found = {name: build(FileRecord, entry, f"{where}: files.{name}") for name, entry in table.items()}
    for name, file in found.items():
        if not _HEX.fullmatch(file.sha256):
            raise FormatError(f"{where}: files.{name}.sha256 is {file.sha256[:80]!r}; expected 64 hexadecimal digits")
    return found


def metrics_record(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON has them: it knows no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def metrics_of(values: object, where: str) -> dict[str, float]:
    """The metrics that ``metrics_record`` wrote; raises FormatError."""
    return {
        name: math.nan if value is None else conform(value, float, f"{where}.{name[:80]}")
        for name, value in as_object(values, where).items()
    }
