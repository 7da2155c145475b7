"""Checkpoints of microsoft/LoRA (``loralib``): one pickle with raw ``lora_A`` and ``lora_B`` and the head.

They hold neither alpha nor labels. The file is opened by ``unpickle`` only, and only when asked to.
"""

from __future__ import annotations

from pathlib import Path

from bertology_serve.deltas.checks import check_head, shapes_of
from bertology_serve.deltas.delta import BaseRef, Delta
from bertology_serve.deltas.layout import MODEL_ROOT
from bertology_serve.deltas.names import check_name
from bertology_serve.deltas.peft_modules import check_none_left, lora_delta
from bertology_serve.deltas.slots import Anatomy
from bertology_serve.deltas.unpickle import read_pickle
from bertology_serve.errors import FormatError
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
    spec, tensors = lora_delta({"r": next(iter(ranks)), "lora_alpha": alpha}, updates, anatomy)
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
