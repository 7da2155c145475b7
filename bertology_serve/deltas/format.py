"""``delta.json``, the truth about a delta: everything but its tensors, the anatomy of its encoder included.

A slot's paths are written as one template (``encoder.layer.{}.attention.self.query``) where every layer has the
module, else as a list with ``null`` for the layers that lack it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

from bertology_serve.deltas.catalog import ADAPTER_WEIGHTS, FULL_WEIGHTS, MANIFEST, check_name
from bertology_serve.deltas.delta import BaseRef
from bertology_serve.deltas.safe_io import as_object, build, check_keys, conform
from bertology_serve.errors import FormatError
from bertology_serve.files import JsonObject
from bertology_serve.kinds.kinds import KINDS, Spec, kind_of
from bertology_serve.kinds.slots import Anatomy, Slot
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
    specs: tuple[Spec, ...]
    anatomy: Anatomy
    tensors: Shapes
    head: Shapes
    files: Mapping[str, FileRecord]
    metrics: Mapping[str, float]
    provenance: JsonObject


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
        "anatomy": anatomy_record(manifest.anatomy),
    }
    try:
        text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{MANIFEST} cannot hold the provenance: {error}; keep it to plain JSON values") from None
    return (_LIST_OF_NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n").encode()


def _task_record(task: TaskSpec) -> dict[str, object]:
    """The task's fields; those that earlier versions do not know only where they are not as there.

    So those read all deltas that they answer rightly, and refuse the others for an unknown field.
    """
    return {
        name: value for name, value in asdict(task).items() if name not in LATER or value != getattr(TaskSpec, name)
    }


LATER = (
    "thresholds", "abstain", "long", "aggregate", "dimensions", "width", "max_terms", "skip_punctuation", "label_texts",
    "template", "scale", "bias", "prompts", "ranges",
)  # fmt: skip

# A list of numbers on lines of its own, which then goes on one line. Strings hold no line breaks in JSON.
_LIST_OF_NUMBERS = re.compile(r"(?<=\[)\n(?:\s*-?[\d.e+-]+,?\n)+\s*(?=\])")


def from_json(values: JsonObject, where: str) -> Manifest:
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
        anatomy=anatomy_of(values["anatomy"], base.family, f"{where}: anatomy"),
        tensors=_shapes(values["tensors"], f"{where}: tensors"),
        head=_shapes(values["head"], f"{where}: head"),
        files=_files(values["files"], where),
        metrics=metrics_of(values["metrics"], f"{where}: metrics"),
        provenance=as_object(values["provenance"], f"{where}: provenance"),
    )


def kinds_record(specs: Sequence[Spec]) -> JsonObject:
    """The kinds' specs by the kinds' names, as plain values; fields that are new (``later``) where they are not as
    before, see ``_task_record``."""
    return {
        kind_of(spec).name: {
            one.name: value
            for one in fields(spec)
            if (value := getattr(spec, one.name)) != one.default or "later" not in one.metadata
        }
        for spec in specs
    }


def specs_of(values: object, where: str) -> tuple[Spec, ...]:
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


MOST_LAYERS, MOST_SLOTS = 1024, 64
_PATH = re.compile(r"\w+(\.\w+)*")
_ELSEWHERE = ("family", "slots")  # the family stands in the record of the base


def anatomy_record(anatomy: Anatomy) -> JsonObject:
    """JSON values of an anatomy; ``restore`` gives it back."""
    plain = {field.name: getattr(anatomy, field.name) for field in fields(anatomy) if field.name not in _ELSEWHERE}
    return {**plain, "slots": {name: _slot_record(slot, anatomy.layers) for name, slot in anatomy.slots.items()}}


def anatomy_of(values: object, family: str, where: str) -> Anatomy:
    """The anatomy that was recorded; raises FormatError for anything that no encoder has."""
    table = dict(as_object(values, where))
    slots = as_object(table.pop("slots", None), f"{where}.slots")
    if "family" in table:
        raise FormatError(f"{where} has an unknown field 'family'; it stands in 'base'")
    anatomy = build(Anatomy, {**table, "family": family}, where)
    sizes = (anatomy.layers, anatomy.hidden, anatomy.heads, anatomy.embedding_width, anatomy.max_tokens)
    if min(sizes) < 1 or anatomy.layers > MOST_LAYERS or anatomy.hidden % anatomy.heads or len(slots) > MOST_SLOTS:
        described = f"{anatomy.layers} layers, H={anatomy.hidden}, {anatomy.heads} heads, {len(slots)} slots"
        raise FormatError(f"{where} describes no encoder: {described}; save the delta again")
    found = {name: _slot(name, slot, anatomy.layers, f"{where}.slots.{name[:40]}") for name, slot in slots.items()}
    return replace(anatomy, slots=found)


def _slot_record(slot: Slot, layers: int) -> JsonObject:
    values = {name: value for name, value in asdict(slot).items() if name != "name" and value not in (None, ())}
    return {**values, "paths": _template(slot.paths, layers) or list(slot.paths)}


def _template(paths: tuple[str | None, ...], layers: int) -> str | None:
    if len(paths) != layers or paths[0] is None:
        return None
    template = re.sub(r"(?<=\.)0(?=\.|$)", "{}", paths[0], count=1)
    return template if "{}" in template and _filled(template, layers) == paths else None


def _filled(template: str, layers: int) -> tuple[str, ...]:
    return tuple(template.replace("{}", str(layer)) for layer in range(layers))


def _slot(name: str, values: object, layers: int, where: str) -> Slot:
    table: JsonObject = as_object(values, where)
    paths = table.get("paths")
    paths = _filled(paths, layers) if isinstance(paths, str) else paths
    slot = build(Slot, {**table, "name": name, "paths": paths}, where)
    if slot.depth not in (1, layers) or not all(path is None or _PATH.fullmatch(path) for path in slot.paths):
        raise FormatError(f"{where}.paths are no dotted module names, one a layer; write the file again")
    lo, hi = slot.part or (0, slot.outputs)
    if slot.inputs < 0 or slot.outputs < 1 or lo < 0 or hi - lo != slot.outputs:
        raise FormatError(f"{where} has {slot.inputs} inputs, {slot.outputs} outputs, part {slot.part}: no such slot")
    if slot.sizes:
        largest = tuple(max(side) for side in zip(*slot.sizes, strict=True))
        lowest = min(min(size) for size in slot.sizes)
        if len(slot.sizes) != slot.depth or largest != (slot.inputs, slot.outputs) or lowest < 0 or slot.part:
            raise FormatError(f"{where}.sizes are not those of {slot.depth} layers of at most {largest}; save it again")
    return slot
