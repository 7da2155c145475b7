"""Deltas on disk: saved, loaded and checked.

A delta is a directory ``NAME/VERSION/``, or any bare directory (see ``catalog``), of these files:

``delta.json``
    The truth: UTF-8 JSON, one object with exactly these keys. ``format``: 1. ``name``. ``base``: name, SHA-256 of the
    weights and family (HuggingFace ``model_type``) of the encoder that it was made for. ``task``: every field of the
    ``TaskSpec``. ``kinds``: by kind (``lora``, ``bitfit``, ``adapter``, ``prompt``, ``prefix``, ...) every field of its
    spec; empty for a linear probe and for full fine-tuning. ``tensors`` and ``head``: shapes of the components'
    tensors (as in memory, layers first) and of the head's (by their names in HuggingFace's task model). ``files``:
    bytes and SHA-256 of each safetensors file. ``metrics``: numbers or null. ``provenance``: any object. ``anatomy``:
    the encoder's dimensions and slots, so that everything can be checked without the encoder.
``adapter_model.safetensors``
    The components' and the head's tensors, float32, named as ``layout`` says: as peft does, where peft has the kind.
``model.safetensors``
    Full fine-tuning only: every encoder weight by its name in the headless HuggingFace model.
``adapter_config.json``
    peft's configuration; there only if peft computes the same function from this directory.
``README.md``
    The model card, for people.

Other files are left alone. A reader believes nothing: it refuses unknown keys, other hashes, sizes, shapes and dtypes,
NaN, names that are not ``[a-z0-9][a-z0-9._-]{0,63}``, and files that lie elsewhere. Pickles are never opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertology_serve.deltas.card import model_card
from bertology_serve.deltas.catalog import check_called, check_place, discover, find, identify
from bertology_serve.deltas.checks import (
    check_base,
    check_finite,
    check_head,
    check_shapes,
    expected_shapes,
    shapes_of,
)
from bertology_serve.deltas.delta import BaseRef, Delta
from bertology_serve.deltas.layout import head_root, to_disk
from bertology_serve.deltas.manifest import Manifest, to_json
from bertology_serve.deltas.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    FULL_WEIGHTS,
    MANIFEST,
    PICKLES,
    check_name,
)
from bertology_serve.deltas.own_format import load_own
from bertology_serve.deltas.peft_export import adapter_config, obstacle, tensor_root
from bertology_serve.deltas.peft_import import import_peft
from bertology_serve.deltas.reading import Limits, untrusted
from bertology_serve.deltas.slots import Anatomy
from bertology_serve.deltas.writing import file_record, publish, staging, write_json, write_tensors
from bertology_serve.errors import FormatError, NotFound
from bertology_serve.tasks.spec import TaskSpec

__all__ = ["Limits", "check_base", "discover", "find", "identify", "load", "save"]


def save(
    delta: Delta,
    directory: Path,
    anatomy: Anatomy,
    config: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Writes a delta to ``directory`` (``ROOT/NAME/VERSION`` or a bare one) and returns it.

    ``anatomy`` and ``config`` (``model.config.to_dict()``) are those of the encoder that it was made for. Saving the
    same delta again changes nothing; another delta is replaced only with ``overwrite``. Raises FormatError for a delta
    that could not be loaded again, or not be seen there.
    """
    options = config or {}
    _check_saveable(delta, anatomy, options)
    check_place(directory, delta.name)
    with staging(directory) as stage:
        written = to_disk(delta.tensors, delta.specs, anatomy, tensor_root(delta.task, anatomy))
        written |= {head_root(delta.specs) + name: tensor for name, tensor in delta.head.items()}
        files = {ADAPTER_WEIGHTS: write_tensors(stage / ADAPTER_WEIGHTS, written)}
        if delta.weights:
            files[FULL_WEIGHTS] = write_tensors(stage / FULL_WEIGHTS, delta.weights)
        manifest = _manifest(delta, anatomy, files)
        (stage / MANIFEST).write_bytes(to_json(manifest))
        hindrance = obstacle(delta, anatomy, options)
        if not hindrance:
            write_json(stage / ADAPTER_CONFIG, adapter_config(delta, anatomy, options))
        (stage / CARD).write_text(model_card(delta, hindrance), encoding="utf-8")
        if not _stands(manifest, stage, directory, overwrite):
            publish(stage, directory)
    return directory


def load(
    directory: Path | str,
    anatomy: Anatomy | None = None,
    *,
    base: BaseRef | None = None,
    task: TaskSpec | str | None = None,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    root: Path | None = None,
    base_head: Mapping[str, Tensor] | None = None,
) -> Delta:
    """The delta in ``directory``, every byte of it checked.

    With ``anatomy`` it must fit that encoder's dimensions (``check_base`` compares the weights' hashes). A directory
    that peft wrote needs ``anatomy`` and ``base``, and takes ``task``, ``options`` and ``base_head`` (see
    ``import_peft``). ``name`` is what the delta is called where its place says so (``identify``); ``delta.json`` must
    say the same. ``root`` is the directory that the files must lie under (default: ``directory``). Raises NotFound,
    FormatError, BaseMismatch, and Unsupported for what peft has and this package has not; each names the directory.
    """
    directory, limits = Path(directory), limits or Limits()
    root = root or directory
    with untrusted(directory):
        _check_directory(directory)
        known = identify(directory, limits, root, name)
        if os.path.lexists(directory / MANIFEST):
            delta = load_own(directory, anatomy, known.version, limits, root)
            check_called(directory, delta.name, name)
            return delta
        if anatomy is None or base is None:
            raise FormatError(f"{directory} was written by peft, which names no weights; give its encoder (--backbone)")
        return import_peft(
            directory, anatomy, base, Path(known.name) / known.version,
            task=task, options=options, limits=limits, root=root, base_head=base_head,
        )  # fmt: skip


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise NotFound(f"no directory {directory}; expected a delta's (with {MANIFEST})")
    peft = (directory / ADAPTER_CONFIG).exists() and (directory / ADAPTER_WEIGHTS).exists()
    if peft or os.path.lexists(directory / MANIFEST):
        return
    pickle = next((name for name in PICKLES if (directory / name).exists()), None)
    if pickle:
        raise FormatError(
            f"{directory} holds {pickle}, a pickle, which can run code and is not opened; "
            f"if you trust it, convert it with bertology-serve convert"
        )
    if (directory / "config.json").exists() and (directory / FULL_WEIGHTS).exists():
        raise FormatError(
            f"{directory} holds a whole model; make a delta of it with bertology-serve convert or compress"
        )
    raise FormatError(f"{directory} is no delta: it lacks {MANIFEST}, or {ADAPTER_CONFIG} with {ADAPTER_WEIGHTS}")


def _check_saveable(delta: Delta, anatomy: Anatomy, options: Mapping[str, Any]) -> None:
    check_name(delta.name, "delta name")
    check_shapes(shapes_of(delta.tensors), expected_shapes(delta.specs, anatomy), f"delta {delta.name!r}")
    check_head(shapes_of(delta.head), delta.task, anatomy, options)
    for tensors in (delta.tensors, delta.head, delta.weights):
        check_finite(tensors)
        _check_dtypes(tensors, (torch.float32,) if tensors is not delta.weights else _STORED)


_STORED = (torch.float32, torch.float16, torch.bfloat16)


def _check_dtypes(tensors: Mapping[str, Tensor], known: tuple[torch.dtype, ...]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in known:
            raise FormatError(f"the tensor {name!r} is {tensor.dtype}; expected {' or '.join(map(str, known))}")


def _manifest(delta: Delta, anatomy: Anatomy, files: Mapping[str, Any]) -> Manifest:
    return Manifest(
        name=delta.name,
        base=delta.base,
        task=delta.task,
        specs=delta.specs,
        anatomy=anatomy,
        tensors=shapes_of(delta.tensors),
        head=shapes_of(delta.head),
        files=files,
        metrics=delta.metrics,
        provenance=delta.provenance,
    )


def _stands(manifest: Manifest, stage: Path, target: Path, overwrite: bool) -> bool:
    """Whether the target holds this very delta already; FormatError when it holds another one that must stay."""
    if not any((target / name).exists() for name in (MANIFEST, ADAPTER_CONFIG)):
        return False
    same = (target / MANIFEST).exists() and file_record(target / MANIFEST) == file_record(stage / MANIFEST)
    if same and all((target / n).exists() and file_record(target / n) == f for n, f in manifest.files.items()):
        return True
    if not overwrite and not same:
        raise FormatError(f"{target} holds another delta already; choose another directory or version, or overwrite it")
    return False
