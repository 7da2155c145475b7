"""Checkpoints of other libraries as deltas: AdapterHub's, peft's and microsoft/LoRA's, pickles included when asked to.

Converting is the explicit act: a directory that is only served or inspected never has a pickle opened.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from bertology_serve.deltas import store
from bertology_serve.deltas.adapterhub import HEAD_WEIGHTS as ADAPTERHUB_HEAD
from bertology_serve.deltas.adapterhub import WEIGHTS, is_adapterhub, read_adapterhub
from bertology_serve.deltas.catalog import is_delta
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.dora import magnitudes, spelt_out
from bertology_serve.deltas.layout import MODEL_ROOT
from bertology_serve.deltas.microsoft_lora import read_microsoft_lora
from bertology_serve.deltas.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST
from bertology_serve.deltas.reading import Limits, read_json, read_tensors
from bertology_serve.deltas.unpickle import read_pickle
from bertology_serve.deltas.writing import write_json, write_tensors
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import FormatError, NotFound, SpecError

# What each pickle becomes.
PICKLED = {
    "pytorch_adapter.bin": WEIGHTS,
    "pytorch_model_head.bin": ADAPTERHUB_HEAD,
    "adapter_model.bin": ADAPTER_WEIGHTS,
}
MOST_BYTES = 8 << 30


@dataclass(frozen=True)
class Told:
    """What a checkpoint does not say: ``alpha`` (microsoft/LoRA), labels in logit order, and the longest sequence."""

    alpha: float | None = None
    labels: tuple[str, ...] = ()
    max_length: int = 128


def convert(source: Path, encoder: Encoder, name: str, told: Told) -> Delta:
    """The delta of a foreign checkpoint, made for ``encoder``, which has taken it.

    ``source`` is a file (microsoft/LoRA) or a directory (AdapterHub, peft). Raises NotFound, FormatError, Unsupported.
    """
    if not source.exists():
        raise NotFound(f"no file or directory {source}; expected a checkpoint")
    with safe_copy(source) as copy:
        delta = _read(source, copy, encoder, name, told)
    task = replace(delta.task, max_length=min(told.max_length, encoder.max_tokens))
    if told.labels:
        if len(told.labels) != max(1, len(task.labels)):
            raise SpecError(f"{len(told.labels)} labels were given, but the head has {len(task.labels)} outputs")
        task = replace(task, labels=told.labels)
    delta = replace(delta, name=name, version="", task=task)
    Pipeline(encoder).add(delta)
    return delta


def _read(source: Path, copy: Path, encoder: Encoder, name: str, told: Told) -> Delta:
    anatomy, base = encoder.anatomy, encoder.ref
    if source.is_file():
        if told.alpha is None:
            raise SpecError("microsoft/LoRA checkpoints do not hold alpha; give --alpha (the GLUE scripts have 16)")
        return read_microsoft_lora(source, anatomy, base, name, told.alpha)
    if (source / MANIFEST).exists():
        raise FormatError(f"{source} is a delta of this package already; --to adapterhub converts it")
    if is_adapterhub(copy):
        return read_adapterhub(copy, anatomy, base, name)
    if not is_delta(copy):
        raise FormatError(f"{source} is no adapter's directory; expected adapter_config.json")
    found = _without_magnitudes(copy, encoder)
    delta = store.load(
        copy, anatomy, base=base, name=name, options=encoder.config.to_dict(), base_head=encoder.base_head
    )
    return spelt_out(delta, found, encoder.model.state_dict(), anatomy) if found else delta


def _without_magnitudes(copy: Path, encoder: Encoder) -> dict[str, Tensor]:
    """The magnitudes of a DoRA checkpoint, which becomes one of LoRA in place; none for others."""
    config, _ = read_json(copy / ADAPTER_CONFIG, Limits(), copy)
    if not config.get("use_dora"):
        return {}
    tensors, _, _ = read_tensors(copy / ADAPTER_WEIGHTS, Limits(), copy)
    found = magnitudes(tensors, encoder.anatomy, MODEL_ROOT)
    write_json(copy / ADAPTER_CONFIG, {**config, "use_dora": False})
    write_tensors(copy / ADAPTER_WEIGHTS, tensors)
    return found


@contextmanager
def safe_copy(source: Path) -> Iterator[Path]:
    """A directory with the JSON and safetensors files of ``source``, its pickles as safetensors; gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkpoint"
        place.mkdir()
        for path in source.iterdir() if source.is_dir() else ():
            if path.suffix in (".json", ".safetensors") and path.is_file() and path.stat().st_size <= MOST_BYTES:
                shutil.copy(path, place)
        for pickled, plain in PICKLED.items():
            if (source / pickled).is_file() and not (place / plain).exists():
                tensors = {key: tensor.clone().contiguous() for key, tensor in read_pickle(source / pickled).items()}
                save_file(tensors, place / plain, {"format": "pt"})
        yield place
