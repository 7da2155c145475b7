"""Labelled examples of a delta's task, and the delta's answers to them with heads masked or not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.analysis.subject_model import Subject, batches, data_name
from bertology_serve.data.records import DataLike, read_records
from bertology_serve.encoder.attention import Group
from bertology_serve.encoder.batch import PackedBatch, read
from bertology_serve.encoder.forward_context import HeadAttention
from bertology_serve.errors import SpecError, Unsupported
from bertology_serve.tasks.base import Item, Task, make_items
from bertology_serve.tasks.heads import aggregate, outputs_of
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import WHOLE_BATCH


class Gates:
    """Takes the place of torch's attention (see ``forward_context.Heads``); differentiable in the gates.

    ``values``: [L, heads] for all sequences, or [S, L, heads], one set a packed sequence.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __call__(
        self, layer: int, group: Group, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        values = self.values[..., : out.shape[1]]  # a pruned layer has fewer heads
        if values.dim() == 2:
            return out * values[layer][:, None, None]
        return out * values[list(group.sequences), layer][:, :, None, None]


class TaskEvaluation:
    """A subject's task and its examples, answered again and again. Raises SpecError without a delta.

    Only ``labelled`` ones have a loss and metrics.
    """

    def __init__(
        self, subject: Subject, data: DataLike, most: int | None, max_tokens: int, labelled: bool = True
    ) -> None:
        if subject.delta is None:
            raise SpecError("answers are those of a task; give the delta that does it (--delta DIR)")
        if subject.delta.task.kind in WHOLE_BATCH:
            raise Unsupported("its loss compares examples with each other; expected a task with a loss for each")
        self.subject, self.max_tokens = subject, max_tokens
        self.task, self.labelled = self.task_of(subject), labelled
        self.name = data_name(data)
        self.records = read_records(data, remembered=subject.delta.columns)[:most]
        self.items = make_items(self.task, self.records, subject.encoder.tokenizer, labelled)

    @staticmethod
    def task_of(subject: Subject) -> Task:
        assert subject.delta is not None
        return task_for(subject.delta.task)

    def groups(self) -> Iterator[list[Item]]:
        """The examples in batches, shortest first."""
        for members in batches([item.tokens for item in self.items], self.max_tokens):
            yield [self.items[i] for i in members]

    def pack(self, items: Sequence[Item]) -> PackedBatch:
        return self.subject.pack([encoding for item in items for encoding in item.encodings])

    def owners(self, batch: PackedBatch, items: Sequence[Item]) -> Tensor:
        """The number of the item that each of the batch's rows belongs to: [T], padded [S · Lmax]."""
        numbers = [number for number, item in enumerate(items) for _ in item.encodings]
        own = torch.tensor([numbers[original] for original in batch.order], device=batch.ids.device)
        lengths = batch.lengths if self.subject.encoder.packs else [batch.stride] * batch.sequences
        return own.repeat_interleave(torch.tensor(lengths, device=own.device))

    def output(self, batch: PackedBatch, heads: HeadAttention | None = None) -> Tensor:
        """The task head's output in the order of the sequences."""
        packed = sorted(range(batch.sequences), key=batch.order.__getitem__)
        assert self.subject.delta is not None
        return read(self.subject.run(batch, heads), batch, packed, self.subject.delta.task, self.subject.head)

    def loss(self, out: Tensor, items: Sequence[Item]) -> Tensor:
        """The sum of the items' losses, a scalar."""
        encodings = [encoding for item in items for encoding in item.encodings]
        targets = [item.target for item in items]
        return self.task.loss(aggregate(out, encodings, self.task.spec), list(map(len, encodings)), targets)

    def gates(self, masked: Collection[int]) -> Tensor:
        """[L, heads]: 0 for the heads of these flat numbers (see ``head_numbers``), 1 for the others."""
        encoder = self.subject.encoder
        gates = torch.ones(encoder.anatomy.layers, encoder.anatomy.heads, dtype=encoder.dtype, device=encoder.device)
        gates.view(-1)[list(masked)] = 0.0
        return gates

    @torch.inference_mode()
    def measure(self, gates: Tensor | None = None) -> dict[str, float]:
        """The task's metrics, and ``loss``, with heads gated by [L, heads]."""
        heads = None if gates is None else Gates(gates)
        answers, examples, loss = [], [], 0.0
        for items in self.groups():
            out = self.output(self.pack(items), heads)
            loss += float(self.loss(out, items))
            for item, parts in zip(items, self.parts(out.float().cpu(), items), strict=True):
                answers.append(self.task.decode(item.example, item.encodings, parts))
                examples.append(item.example)
        weight = max(1, self.task.weight([item.target for item in self.items]))
        return {**self.task.metrics(answers, examples), "loss": loss / weight}

    def parts(self, out: Tensor, items: Sequence[Item]) -> list[list[Tensor]]:
        """For each item the outputs that ``Task.decode`` takes."""
        groups = [item.encodings for item in items]
        whole = aggregate(out, [encoding for own in groups for encoding in own], self.task.spec)
        return outputs_of(whole, groups, self.task.spec)
