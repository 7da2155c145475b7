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

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bertology_serve.deltas.catalog import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    FILES,
    FULL_WEIGHTS,
    MANIFEST,
    PICKLES,
    check_called,
    check_name,
    check_place,
    discover,
    find,
    identify,
)
from bertology_serve.deltas.delta import BaseRef, Delta, EncoderShape
from bertology_serve.deltas.format import FileRecord, Manifest, from_json, to_json
from bertology_serve.deltas.layout import (
    adapter_config,
    check_base,
    check_finite,
    check_fits,
    check_head,
    check_shapes,
    expected_shapes,
    from_disk,
    head_root,
    obstacle,
    shapes_of,
    tensor_root,
    to_disk,
)
from bertology_serve.deltas.safe_io import Limits, read_json, read_tensors, untrusted
from bertology_serve.errors import FormatError, NotFound, SpecError, Unsupported
from bertology_serve.files import JsonObject, flush, replace_directory, staging, write_json
from bertology_serve.kinds.kinds import Tensors
from bertology_serve.kinds.peft_format import take
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks import spec as tasks
from bertology_serve.tasks.spec import TaskSpec

__all__ = ["Limits", "check_base", "discover", "find", "identify", "load", "save"]


def save(
    delta: Delta,
    directory: Path,
    anatomy: Anatomy,
    config: JsonObject | None = None,
    *,
    overwrite: bool = False,
    peft: bool = True,
) -> Path:
    """Writes a delta to ``directory`` (``ROOT/NAME/VERSION`` or a bare one) and returns it.

    ``anatomy`` and ``config`` (``model.config.to_dict()``) are those of the encoder that it was made for. Saving the
    same delta again changes nothing; another delta is replaced only with ``overwrite``. Without ``peft`` its
    configuration is left out. Raises FormatError for a delta that could not be loaded again, or not be seen there.
    """
    options = config or {}
    _check_saveable(delta, anatomy, options)
    check_place(directory, delta.name)
    with staging(directory) as stage:
        written = to_disk(delta.tensors, delta.specs, anatomy, tensor_root(delta.task, anatomy))
        written |= {head_root(delta.specs, anatomy) + name: tensor for name, tensor in delta.head.items()}
        files = {ADAPTER_WEIGHTS: write_tensors(stage / ADAPTER_WEIGHTS, written)}
        if delta.weights:
            files[FULL_WEIGHTS] = write_tensors(stage / FULL_WEIGHTS, delta.weights)
        manifest = _manifest(delta, anatomy, files)
        (stage / MANIFEST).write_bytes(to_json(manifest))
        hindrance = obstacle(delta, anatomy, options) or ("" if peft else "it was saved without its configuration")
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
    options: JsonObject | None = None,
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
        from bertology_serve.deltas.interop.peft_import import import_peft

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


def _check_saveable(delta: Delta, anatomy: Anatomy, options: JsonObject) -> None:
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


def _manifest(delta: Delta, anatomy: Anatomy, files: JsonObject) -> Manifest:
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
        provenance=dict(manifest.provenance),
        made_for=EncoderShape(manifest.anatomy, peft=(directory / ADAPTER_CONFIG).is_file()),
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
    root = head_root(manifest.specs, manifest.anatomy)
    head = {name: take(written, root + name, shape) for name, shape in manifest.head.items()}
    check_shapes(shapes_of(written), {}, ADAPTER_WEIGHTS)
    return tensors, head


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Writes a safetensors file; what it must be from then on."""
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}  # no shared memory
    save_file(copies, path, {"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read; the umask decides here
    return file_record(path)


def file_record(path: Path) -> FileRecord:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def publish(stage: Path, target: Path) -> None:
    """Moves the files of ``stage`` to ``target``, flushed to the disk before they are seen."""
    if target.exists() and not target.is_dir():
        raise FormatError(f"{target} is a file; expected a directory to write the delta to")
    if target.exists() and any(path.name not in FILES for path in target.iterdir()):
        _move_files(stage, target)
    else:
        replace_directory(stage, target)


def _move_files(stage: Path, target: Path) -> None:
    for path in stage.iterdir():
        flush(path)
    for name in (ADAPTER_CONFIG, MANIFEST):
        (target / name).unlink(missing_ok=True)
    for name in FILES:
        if (stage / name).exists():
            (stage / name).replace(target / name)
        else:
            (target / name).unlink(missing_ok=True)
    flush(target)


_PIPELINE_TAGS = {
    tasks.CLASSIFICATION: "text-classification",
    tasks.MULTI_LABEL: "text-classification",
    tasks.REGRESSION: "text-classification",
    tasks.TOKEN_CLASSIFICATION: "token-classification",
    tasks.QUESTION_ANSWERING: "question-answering",
    tasks.MULTIPLE_CHOICE: "multiple-choice",
    tasks.EMBEDDING: "sentence-similarity",
    tasks.ZERO_SHOT: "zero-shot-classification",
    tasks.SPARSE: "feature-extraction",
    tasks.MULTI_VECTOR: "sentence-similarity",
}
_LABELS_SHOWN = 20


def model_card(delta: Delta, obstacle: str) -> str:
    """Markdown with YAML front matter. ``obstacle`` says why peft does not load the delta; empty where it does."""
    parts = [_front_matter(delta, obstacle), f"# {delta.name}", _claim(delta), _table(_facts(delta))]
    if delta.metrics:
        rows = {_code(name): f"{value:.4g}" for name, value in delta.metrics.items()}
        parts += ["## Metrics", _table(rows)]
    parts += ["## Use", _use(delta, obstacle)]
    if delta.provenance:
        text = json.dumps(dict(delta.provenance), indent=1, ensure_ascii=False).replace("```", "` ` `")
        parts += ["## Provenance", f"```json\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def _front_matter(delta: Delta, obstacle: str) -> str:
    values: JsonObject = {
        "library_name": "bertology-serve" if obstacle else "peft",
        "base_model": delta.base.name,
        "pipeline_tag": _PIPELINE_TAGS[delta.task.kind],
        "tags": ["bertology-serve", *delta.kinds],
    }
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in values.items()), "---"])


def _claim(delta: Delta) -> str:
    return f"A {' + '.join(delta.kinds)} delta of {_code(delta.base.name)} for {delta.task.kind}."


def _facts(delta: Delta) -> dict[str, str]:
    task, labels = delta.task, [_code(label) for label in delta.task.labels[:_LABELS_SHOWN]]
    more = len(task.labels) - len(labels)
    groups = (delta.tensors, delta.head, delta.weights)
    counts = [sum(tensor.numel() for tensor in group.values()) for group in groups]
    facts = {
        "base model": f"{_code(delta.base.name)} ({delta.base.family}, weights {_code(delta.base.sha256[:12] or '?')})",
        "kinds": ", ".join(delta.kinds),
        "task": f"{task.kind}, at most {task.max_length} tokens, {task.pooling} pooling",
        "labels": ", ".join(labels) + (f" and {more} more" if more else ""),
        "parameters": f"{counts[0] + counts[2]:,} and {counts[1]:,} of the head",
        "size": f"{delta.bytes:,} bytes",
    }
    return {name: text for name, text in facts.items() if text}


def _use(delta: Delta, obstacle: str) -> str:
    lines = [
        "```",
        f"bertology-serve predict --backbone {_code(delta.base.name)[1:-1]} --deltas DIR --input FILE --output FILE",
        "```",
        "",
        f"The delta refuses every other base than the one with weights {_code(delta.base.sha256[:12] or '?')}.",
    ]
    peft = "It loads in peft too: `PeftModel.from_pretrained(task_model, DIR)`."
    return "\n".join([*lines, "", f"peft does not load it: {obstacle}." if obstacle else peft])


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


def _code(text: str) -> str:
    """Inline code that no text can break out of."""
    return "`" + " ".join(text.replace("`", "'").replace("|", "¦").split()) + "`"
