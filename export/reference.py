"""What the verifier compares with: the torch engine, a delta unmerged, on packed rows; and HuggingFace's own model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.bank import BARE
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.packing import pack
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.encoder.reading import form_for, read
from bertology_serve.errors import Unsupported
from bertology_serve.export.layout import CLASSES, architectures
from bertology_serve.export.parts import parts_of
from bertology_serve.export.plain import plain_model, task_model
from bertology_serve.export.samples import Case
from bertology_serve.tasks.heads import Head
from bertology_serve.tasks.spec import EMBEDDING, MULTIPLE_CHOICE, QUESTION_ANSWERING, Encoding


class Reference:
    """One delta on the engine that serves it. Raises what ``Pipeline.add`` raises: BaseMismatch, LimitError."""

    def __init__(self, encoder: Encoder, delta: Delta) -> None:
        self.encoder, self.delta, self.task = encoder, delta, delta.task
        self._pipeline = Pipeline(encoder)
        self._pipeline.add(delta)
        self._entry = next(iter(self._pipeline.bank.entries.values()), BARE)
        self._head = Head.build(form_for(encoder, delta.task), encoder.base_head)
        self._head.load(delta.head)
        self._head.eval()

    @torch.inference_mode()
    def outputs(self, encodings: Sequence[Encoding]) -> list[Tensor]:
        """[C], for tasks that answer for every token [len, C], for embeddings [H] as the task normalises them."""
        encoder = self.encoder
        entries = [self._entry] * len(encodings)
        batch = pack(encodings, entries, encoder.anatomy, encoder.device, padded=not encoder.packs)
        hidden = encoder.run(batch, self._pipeline.bank)
        packed = sorted(range(batch.sequences), key=batch.order.__getitem__)
        out = read(hidden, batch, packed, self.task, self._head)
        if self.task.kind == EMBEDDING and self.task.normalize:
            out = F.normalize(out, dim=-1)
        parts = torch.split(out, [batch.text_lengths[i] for i in packed]) if self.task.per_token else out.unbind(0)
        return [part.cpu() for part in parts]


class Theirs:
    """A delta merged into HuggingFace's own model, in padded batches: nothing of the torch engine is in it.

    Of the task where HuggingFace has a model for it, with the head that the delta has; else of the encoder, to whose
    rows pooling and head are applied here. ``name`` says which. Raises what ``plain.task_model`` raises.
    """

    def __init__(self, encoder: Encoder, delta: Delta) -> None:
        self.task, self._pad = delta.task, encoder.tokenizer.pad_token_id or 0
        self._parts = parts_of(encoder, delta, merge=True)
        kind, names = self._parts.kind, architectures(delta) if delta.task.kind in CLASSES else []
        self._whole = bool(names) and delta.task.head == "hf" and (delta.task.per_token or delta.task.pooling == "cls")
        if self._whole:
            self._model = task_model(self._parts, names[0], "eager")
        else:
            self._model = plain_model(kind, self._parts.config, self._parts.state, "eager")
        self.name = f"transformers' {names[0] if self._whole else kind.__name__}"

    @classmethod
    def of(cls, encoder: Encoder, delta: Delta) -> Theirs | None:
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
        inputs = {name: torch.from_numpy(batch[name]) for name in self._parts.inputs}
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
        out: Tensor = self._parts.head(rows if self.task.per_token else pooled[self.task.pooling]()[None])
        if self.task.kind == EMBEDDING and self.task.normalize:
            out = F.normalize(out, dim=-1)
        return out if self.task.per_token else out[0]
