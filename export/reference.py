"""The torch engine's own outputs for the verifier: the delta unmerged, on packed rows."""

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
from bertology_serve.tasks.heads import Head
from bertology_serve.tasks.spec import EMBEDDING, Encoding


class Reference:
    """One delta on the engine that serves it. Raises what ``Pipeline.add`` raises: BaseMismatch, LimitError."""

    def __init__(self, encoder: Encoder, delta: Delta) -> None:
        self.encoder, self.task = encoder, delta.task
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
