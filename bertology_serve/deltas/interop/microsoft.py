"""Checkpoints of microsoft/LoRA (``loralib``), and the explicit conversion of pickles, which are opened here only.

They hold neither alpha nor labels. The file is opened by ``read_pickle`` only, and only when asked to.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bertology_serve.deltas.catalog import ADAPTER_WEIGHTS, check_name
from bertology_serve.deltas.delta import BaseRef, Delta
from bertology_serve.deltas.layout import check_finite, check_head, shapes_of
from bertology_serve.deltas.safe_io import Limits, read_tensors
from bertology_serve.errors import FormatError, NotFound
from bertology_serve.kinds.kinds import Tensors, from_peft
from bertology_serve.kinds.lora import LORA, check_none_left
from bertology_serve.kinds.peft_format import MODEL_ROOT
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.spec import CLASSIFICATION, REGRESSION, TaskSpec


def read_microsoft_lora(
    path: Path, anatomy: Anatomy, base: BaseRef, name: str, alpha: float, task: TaskSpec | None = None
) -> Delta:
    """The delta of a checkpoint, for the encoder ``base``; the update is scaled by ``alpha / rank``.

    Without ``task`` it is classification (regression for one output), labels ``LABEL_0``... Raises FormatError.
    """
    found = {key.removeprefix("module."): tensor.float() for key, tensor in read_pickle(path).items()}
    number = next((key for key, tensor in found.items() if not tensor.dim()), None)
    if number is not None:
        raise FormatError(f"{path} holds a single number under {number[:120]!r}; expected weights and biases")
    updates = {
        f"{MODEL_ROOT}{key}.weight": found.pop(key) for key in list(found) if key.endswith((".lora_A", ".lora_B"))
    }
    if not updates:
        raise FormatError(f"{path} holds no ...lora_A and ...lora_B; expected a checkpoint of microsoft/LoRA")
    ranks = {len(tensor) for key, tensor in updates.items() if ".lora_A." in key}
    if len(ranks) != 1:
        raise FormatError(f"{path} has updates of ranks {sorted(ranks)}; expected one rank")
    spec, tensors = from_peft(LORA, {"r": next(iter(ranks)), "lora_alpha": alpha}, updates, anatomy)
    check_none_left(updates, anatomy)
    head = {key: tensor for key, tensor in found.items() if not key.startswith(f"{anatomy.prefix}.")}
    extra = sorted(found.keys() - head.keys())
    if extra:
        raise FormatError(f"{path} holds weights of the encoder too ({extra[0]}); save loralib.lora_state_dict alone")
    outputs = next((len(t) for key, t in head.items() if key.endswith(("out_proj.weight", "classifier.weight"))), 0)
    if not outputs:
        raise FormatError(f"{path} holds no classifier; expected ...out_proj.weight or classifier.weight")
    labels = tuple(f"LABEL_{i}" for i in range(outputs))
    task = task or (TaskSpec(REGRESSION) if outputs == 1 else TaskSpec(CLASSIFICATION, labels))
    check_head(shapes_of(head), task, anatomy, {})
    origin = {"imported_from": "microsoft/LoRA", "file": path.name, "alpha": alpha}
    return Delta(check_name(name, "delta name"), base, task, (spec,), tensors, head, provenance=origin)


# The pickles of other libraries, by the safetensors files that they write today.
PICKLED = {
    ADAPTER_WEIGHTS: "adapter_model.bin",
    "adapter.safetensors": "pytorch_adapter.bin",
    "model_head.safetensors": "pytorch_model_head.bin",
}


def read_trusted(path: Path) -> Tensors:
    """The tensors of a safetensors file, or of the pickle that stands in its place in the directory, by ``PICKLED``.

    Raises FormatError for a malformed file, and where there is neither.
    """
    pickled = path.with_name(PICKLED[path.name])
    if path.exists() or not pickled.is_file():
        return read_tensors(path, Limits(), path.parent)[0]
    tensors = read_pickle(pickled)
    check_finite(tensors)
    return tensors


def read_pickle(source: Path) -> dict[str, Tensor]:
    """The table of tensors of a pickle; torch unpickles tensors and plain containers only (``weights_only=True``).

    The tensors are dense, on the CPU, and no larger than what the file holds of them. Raises NotFound, and FormatError
    for whatever else it holds and for what cannot be read.
    """
    if not source.is_file():
        raise NotFound(f"no file {source}; expected a pickled table of tensors")
    try:
        values = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle is a program: it ends in whatever error its author likes
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise FormatError(f"{source} is damaged or holds more than tensors ({reason}); do not use it") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) and _is_plain(values[key]) for key in values):
        raise FormatError(f"{source} holds no table of tensors; expected a checkpoint's")
    return values


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex())
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )
