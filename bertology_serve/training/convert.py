"""Checkpoints of other libraries as deltas: AdapterHub's, peft's and microsoft/LoRA's, pickles included when asked to.

Converting is the explicit act: a directory that is only served or inspected never has a pickle opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from bertology_serve.deltas.catalog import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST, is_delta
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.interop.adapterhub import is_adapterhub, read_adapterhub
from bertology_serve.deltas.interop.microsoft import read_microsoft_lora, read_trusted
from bertology_serve.deltas.interop.peft_import import import_peft, magnitudes, spelt_out, unwrapped
from bertology_serve.deltas.safe_io import Limits, read_json
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.opening import is_task_model, read_task_model, verify_peft
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import FormatError, NotFound, SpecError, Unsupported
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.kinds import Tensors
from bertology_serve.kinds.norms import Norms
from bertology_serve.kinds.peft_format import MERGE, MODEL_ROOT
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.training.compress import differences, dropped, moved_biases, moved_norms


@dataclass(frozen=True)
class ConvertOptions:
    """What a checkpoint does not say: ``alpha`` (microsoft/LoRA), labels in logit order, the longest sequence (without
    it what the checkpoint says, at most 128), and the kind of the task.
    """

    alpha: float | None = None
    labels: tuple[str, ...] = ()
    max_length: int | None = None
    task: str | None = None


def convert(source: Path, encoder: Encoder, name: str, told: ConvertOptions) -> Delta:
    """The delta of a foreign checkpoint, made for ``encoder``, which has taken it.

    ``source`` is a file (microsoft/LoRA) or a directory (AdapterHub, peft, or a whole task model of HuggingFace's, such
    as peft's merge leaves). What peft or transformers can run is compared with them; ``provenance["verified"]`` says
    how. Raises NotFound, FormatError, Unsupported, VerificationError.
    """
    if not source.exists():
        raise NotFound(f"no file or directory {source}; expected a checkpoint")
    delta = _read(source, encoder, name, told)
    longest = told.max_length or min(LONGEST, delta.task.max_length)
    task = replace(delta.task, max_length=min(longest, encoder.max_tokens))
    if told.labels:
        if len(told.labels) != max(1, len(task.labels)):
            raise SpecError(f"{len(told.labels)} labels were given, but the head has {len(task.labels)} outputs")
        task = replace(task, labels=told.labels)
    delta = replace(delta, name=name, version="", task=task)
    if delta.weights:
        return delta
    Pipeline(encoder).add(delta)
    if delta.provenance.get("imported_from") != "peft":
        return delta
    return replace(delta, provenance={**delta.provenance, "verified": verify_peft(source, delta, encoder)})


LONGEST = 128


def _read(source: Path, encoder: Encoder, name: str, told: ConvertOptions) -> Delta:
    anatomy, base = encoder.anatomy, encoder.ref
    if source.is_file():
        if told.alpha is None:
            raise SpecError("microsoft/LoRA checkpoints do not hold alpha; give --alpha (the GLUE scripts have 16)")
        return read_microsoft_lora(source, anatomy, base, name, told.alpha)
    if (source / MANIFEST).exists():
        raise FormatError(f"{source} is a delta of this package already; --to adapterhub converts it")
    if is_adapterhub(source):
        return read_adapterhub(source, anatomy, base, name)
    if is_task_model(source):
        return read_task_model(source, encoder, name)
    if not is_delta(source):
        raise FormatError(f"{source} is no adapter's directory; expected adapter_config.json, or a whole task model")
    return _read_peft(source, encoder, name, told)


def _read_peft(source: Path, encoder: Encoder, name: str, told: ConvertOptions) -> Delta:
    """Whatever ``peft_import`` reads, and what takes the base's weights: DoRA, and biases and norms that peft holds
    whole.
    """
    config, _ = read_json(source / ADAPTER_CONFIG, Limits(), source)
    tensors, anatomy = read_trusted(source / ADAPTER_WEIGHTS), encoder.anatomy
    base, found, settings = encoder.model.state_dict(), {}, dict(config)
    if config.get("use_dora"):
        found, settings["use_dora"] = magnitudes(tensors, anatomy, MODEL_ROOT), False
    moved = differences(_wholes(tensors, anatomy, base), base)
    if config.get("bias") in ("all", "lora_only"):
        settings["bias"] = "none"  # they are among ``moved``
    delta = import_peft(
        source, replace(anatomy, max_tokens=min(anatomy.max_tokens, encoder.max_tokens)), encoder.ref, Path(name) / "1",
        task=told.task, options=encoder.config.to_dict(), base_head=encoder.base_head, read=(settings, tensors),
    )  # fmt: skip
    delta = spelt_out(delta, found, base, anatomy) if found else delta
    return _with_moved(delta, moved, anatomy, source) if moved else delta


def _wholes(tensors: Tensors, anatomy: Anatomy, base: Mapping[str, Tensor]) -> Tensors:
    """Takes the encoder's biases and norms out of ``tensors``, by their names in the headless encoder."""
    found: Tensors = {}
    for name in [name for name in tensors if ".original_module." not in name]:
        path = unwrapped(name.removeprefix(MODEL_ROOT)).removeprefix(f"{anatomy.prefix}.")
        if path in base and tensors[name].dim() == 1 and tensors[name].shape == base[path].shape:
            found[path] = tensors.pop(name).float()
    return found


def _with_moved(delta: Delta, moved: Mapping[str, Tensor], anatomy: Anatomy, source: Path) -> Delta:
    """The delta, and the differences of biases and norms with it."""
    lost = sorted(dropped(moved, anatomy))
    if lost:
        raise Unsupported(f"{source} moves {lost[0]}, which no delta holds; {MERGE}")
    specs, tensors = list(delta.specs), dict(delta.tensors)
    for spec, parts in (
        (Bitfit(), moved_biases(moved, anatomy)),
        (Norms(biases=False), moved_norms(moved, anatomy)),
    ):
        specs += [spec] if parts and spec not in specs else []
        tensors |= {name: tensors[name] + part if name in tensors else part for name, part in parts.items()}
    return replace(delta, specs=tuple(specs), tensors=tensors)
