"""An anatomy as JSON, so that a delta can be read and checked without its encoder.

A slot's paths are written as one template (``encoder.layer.{}.attention.self.query``) where every layer has the
module, else as a list with ``null`` for the layers that lack it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from bertology_serve.deltas.typed import as_object, build
from bertology_serve.errors import FormatError
from bertology_serve.kinds.slots import Anatomy, Slot

MOST_LAYERS, MOST_SLOTS = 1024, 64
_PATH = re.compile(r"\w+(\.\w+)*")
_ELSEWHERE = ("family", "slots")  # the family stands in the record of the base


def record(anatomy: Anatomy) -> dict[str, Any]:
    """JSON values of an anatomy; ``restore`` gives it back."""
    plain = {field.name: getattr(anatomy, field.name) for field in fields(anatomy) if field.name not in _ELSEWHERE}
    return {**plain, "slots": {name: _slot_record(slot, anatomy.layers) for name, slot in anatomy.slots.items()}}


def restore(values: object, family: str, where: str) -> Anatomy:
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


def _slot_record(slot: Slot, layers: int) -> dict[str, Any]:
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
    table: Mapping[str, Any] = as_object(values, where)
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
