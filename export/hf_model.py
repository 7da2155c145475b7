"""HuggingFace's own models with a delta merged into them: the reference that has nothing of this package in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import shrink
from bertology_serve.errors import Unsupported, VerificationError
from bertology_serve.export.export_directory import CLASSES, architectures
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.samples import Case
from bertology_serve.families import compat
from bertology_serve.tasks.spec import MULTIPLE_CHOICE, QUESTION_ANSWERING, Encoding


def hf_model(kind: type[Any], config: Any, state: Mapping[str, Tensor], attention: str) -> Any:
    """A headless HuggingFace model of class ``kind``, float32, on CPU, not training.

    ``state`` is a state dict of that model; biases that the class does not have are added to the linears and norms
    that it names. ``attention`` is a name that transformers' attention interface knows (``eager``, ``sdpa``).
    """
    config = copy.deepcopy(config)
    compat.use_attention(config, attention)
    with torch.random.fork_rng(devices=[]):
        model = kind(config)
    model.pooler = None
    shrink(model, state)
    for name in state.keys() - model.state_dict().keys():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "bias" and isinstance(module, nn.Linear | nn.LayerNorm):
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0]))
    model.load_state_dict(dict(state))
    return model.float().eval().requires_grad_(False)


def task_models(delta: Delta) -> list[str]:
    """The task models of transformers' that answer as the delta does, by name; none where its head is another."""
    answers_alike = delta.task.head == "hf" and (delta.task.per_token or delta.task.pooling == "cls")
    return architectures(delta) if answers_alike and delta.task.kind in CLASSES else []


def task_model(export_inputs: ExportInputs, name: str, attention: str) -> Any:
    """HuggingFace's task model of class ``name`` with merged weights and head.

    float32, on CPU, not training. Raises Unsupported for a tensor that the class has no place for, and
    VerificationError where the class has one that they lack: what it adds to an answer would be missing.
    """
    import transformers

    config = copy.deepcopy(export_inputs.config)
    config.num_labels = export_inputs.task.outputs
    compat.use_attention(config, attention)
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, name)(config)
    head: dict[str, Tensor] = {name: tensor.detach() for name, _, tensor in export_inputs.head.named()}
    state = {f"{model.base_model_prefix}.{name}": tensor for name, tensor in export_inputs.state.items()} | head
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected:
        raise Unsupported(f"{name} has no place for {unexpected[0]}; give another delta")
    if missing:
        raise VerificationError(
            f"transformers' {name} also has {missing[0]}, which the delta is answered without here; nothing was "
            "published: report it"
        )
    return model.float().eval().requires_grad_(False)


class HfReference:
    """A delta merged into HuggingFace's own model, in padded batches: nothing of the torch engine is in it.

    Of the task where HuggingFace has a model for it, with the head that the delta has; else of the encoder, to whose
    rows pooling and head are applied here. ``name`` says which. Raises what ``task_model`` raises.
    """

    def __init__(self, encoder: Encoder, delta: Delta) -> None:
        self.task, self._pad = delta.task, encoder.tokenizer.pad_token_id or 0
        self._export_inputs = ExportInputs.of(encoder, delta, merge=True)
        kind, names = self._export_inputs.kind, task_models(delta)
        self._whole = bool(names)
        if names:
            self._model = task_model(self._export_inputs, names[0], "eager")
        else:
            self._model = hf_model(kind, self._export_inputs.config, self._export_inputs.state, "eager")
        self.name = f"transformers' {names[0] if self._whole else kind.__name__}"

    @classmethod
    def of(cls, encoder: Encoder, delta: Delta) -> HfReference | None:
        """``None`` where HuggingFace's model cannot hold the delta."""
        if encoder.is_pruned or delta.effects(encoder.anatomy).unfoldable:
            return None
        try:
            return cls(encoder, delta)
        except Unsupported:
            return None

    @torch.inference_mode()
    def outputs(self, encodings: Sequence[Encoding]) -> list[Tensor]:
        """As ``Reference.outputs``."""
        batch = Case(tuple(encodings), max(map(len, encodings)), left=False).arrays(self._pad)
        inputs = {name: torch.from_numpy(batch[name]) for name in self._export_inputs.inputs}
        if self._whole and self.task.kind == MULTIPLE_CHOICE:
            inputs = {name: rows.unsqueeze(1) for name, rows in inputs.items()}  # one choice a question
        found = self._model(**inputs)
        if not self._whole:
            rows = zip(found.last_hidden_state, encodings, strict=True)
            return [self._answer(own[: len(one)]) for own, one in rows]
        answering = self.task.kind == QUESTION_ANSWERING
        out = torch.stack([found.start_logits, found.end_logits], -1) if answering else found.logits
        return [row[: len(one)] if self.task.per_token else row for row, one in zip(out, encodings, strict=True)]

    def _answer(self, rows: Tensor) -> Tensor:
        """The rows [len, H] of one sequence's text -> what it is answered."""
        pooled = {"cls": lambda: rows[0], "mean": lambda: rows.mean(0), "max": lambda: rows.amax(0)}
        own = rows if self.task.reads_rows else pooled[self.task.pooling]()[None]
        out = self._export_inputs.head.read(own, [len(rows)], self.task)
        if self.task.unit:
            out = F.normalize(out, dim=-1)
        return out if self.task.per_token else out[0]
