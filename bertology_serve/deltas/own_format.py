"""Reads a directory that this package wrote; ``store`` describes it."""

from __future__ import annotations

from pathlib import Path

from bertology_serve.deltas.checks import check_fits, check_head, check_shapes, expected_shapes, shapes_of
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.kind import Tensors
from bertology_serve.deltas.layout import from_disk, head_root
from bertology_serve.deltas.manifest import Manifest, from_json
from bertology_serve.deltas.modules import take
from bertology_serve.deltas.names import ADAPTER_WEIGHTS, FULL_WEIGHTS, MANIFEST
from bertology_serve.deltas.peft_export import tensor_root
from bertology_serve.deltas.reading import Limits, read_json, read_tensors
from bertology_serve.deltas.slots import Anatomy
from bertology_serve.errors import FormatError, SpecError, Unsupported


def load_own(directory: Path, anatomy: Anatomy | None, version: str, limits: Limits, root: Path) -> Delta:
    """The delta of a directory with ``delta.json``; raises FormatError, or BaseMismatch where it does not fit."""
    values, _ = read_json(directory / MANIFEST, limits, root)
    manifest = from_json(values, str(directory / MANIFEST))
    try:
        check_shapes(manifest.tensors, expected_shapes(manifest.specs, manifest.anatomy), MANIFEST)
        check_head(manifest.head, manifest.task, manifest.anatomy, {})
        tensors, head = _unpacked(_read(directory, ADAPTER_WEIGHTS, manifest, limits, root), manifest)
    except (FormatError, SpecError, Unsupported) as error:
        known = isinstance(error, FormatError) and str(directory) in str(error)
        raise FormatError(str(error) if known else f"{directory}: {error}") from None
    weights = _read(directory, FULL_WEIGHTS, manifest, limits, root) if FULL_WEIGHTS in manifest.files else {}
    delta = Delta(
        name=manifest.name,
        base=manifest.base,
        task=manifest.task,
        specs=manifest.specs,
        tensors=tensors,
        head=head,
        weights=weights,
        version=version,
        metrics=manifest.metrics,
        provenance=manifest.provenance,
    )
    if anatomy is not None:
        check_fits(delta, manifest.anatomy, anatomy)
    return delta


def _read(directory: Path, file: str, manifest: Manifest, limits: Limits, root: Path) -> Tensors:
    tensors, digest, size = read_tensors(directory / file, limits, root)
    expected = manifest.files[file]
    if (size, digest) != (expected.bytes, expected.sha256):
        raise FormatError(
            f"{directory / file} has {size} bytes and SHA-256 {digest[:12]}; {MANIFEST} expects {expected.bytes} and "
            f"{expected.sha256[:12]}: copy the directory again"
        )
    return tensors


def _unpacked(written: Tensors, manifest: Manifest) -> tuple[Tensors, Tensors]:
    """Components and head in their memory form; every tensor of the file must be one of the two."""
    written = {name: tensor.float() for name, tensor in written.items()}
    tensors = from_disk(written, manifest.specs, manifest.anatomy, tensor_root(manifest.task, manifest.anatomy))
    check_shapes(shapes_of(tensors), manifest.tensors, ADAPTER_WEIGHTS)
    root = head_root(manifest.specs)
    head = {name: take(written, root + name, shape) for name, shape in manifest.head.items()}
    check_shapes(shapes_of(written), {}, ADAPTER_WEIGHTS)
    return tensors, head
