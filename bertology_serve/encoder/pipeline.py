"""Answers records for many deltas: tokenise, pack, one forward pass, each delta's head, decode.

The one path that prediction, evaluation and serving share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.bank import BARE, DeltaBank
from bertology_serve.encoder.batch import PackedBatch, read
from bertology_serve.encoder.delta_set import BASE, DeltaSet, Job, LoadedDelta, Prediction, Request
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.sharing import share
from bertology_serve.errors import SpecError
from bertology_serve.tasks.fields import divided
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import Encoding

__all__ = ["BASE", "DeltaSet", "Engine", "Job", "LoadedDelta", "Pipeline", "Prediction", "Request"]


class Engine(Protocol):
    """What runs batches: the encoder itself, or what gives the same rows faster."""

    def run(self, batch: PackedBatch, pools: DeltaBank) -> Tensor:
        """The hidden states [T, H] of every row of a batch, float32 or the encoder's type."""
        ...


class Pipeline(DeltaSet):
    """An encoder of this process with its resident deltas. ``engine`` runs their batches; it is the encoder unless it
    was replaced. Raises SpecError for what is no encoder.
    """

    encoder: Encoder

    def __init__(self, encoder: Encoder, deltas: Iterable[Delta] = ()) -> None:
        if not isinstance(encoder, Encoder):
            raise SpecError(f"a pipeline runs on an encoder, not on {encoder!r:.60}; give Encoder('minilm')")
        super().__init__(encoder)
        self.engine: Engine = encoder
        self.bank = DeltaBank(encoder.anatomy, encoder.dtype, encoder.device)
        for delta in deltas:
            self.add(delta)

    @overload
    def __call__(self, items: str | Mapping[str, Any], delta: str = BASE) -> Prediction: ...

    @overload
    def __call__(self, items: list[Any] | tuple[Any, ...], delta: str = BASE) -> list[Prediction]: ...

    def __call__(self, items: Any, delta: str = BASE) -> Prediction | list[Prediction]:
        """One delta's answer to a text, or to a record with the fields of its task; of a list, one answer each.

        ``pipeline("I left smiling.", delta="sentiment")``. Raises what ``answer`` raises.
        """
        several = not isinstance(items, str | Mapping)
        if several and not isinstance(items, list | tuple):
            raise SpecError(f"a pipeline got a {type(items).__name__}; expected a text, a record, or a list of them")
        records = [{"text": item} if isinstance(item, str) else item for item in (items if several else [items])]
        found = self.answer(Request(delta, record) for record in records)
        return found if several else found[0]

    def ask_many(self, deltas: Iterable[str], item: str | Mapping[str, Any]) -> dict[str, Prediction]:
        """Several deltas' answers to one text or record, by name; its rows are computed once, as far as they let it.

        Options that only some of their tasks take are for those. Raises what ``answer`` raises.
        """
        if isinstance(deltas, str):
            raise SpecError(f"several deltas are asked, not {deltas!r}; expected a list of their names")
        record = {"text": item} if isinstance(item, str) else item
        kinds = {name: self._find(name).delta.task.kind for name in deltas}
        requests = [Request(name, own) for name, own in divided(record, "request", kinds).items()]
        found = self.run([self.prepare(request) for request in requests])
        return {prediction.delta: prediction for prediction in found}

    def read(self, path: Path, name: str) -> Delta:
        return self.encoder.read_delta(path, name)

    def resident_bytes(self, delta: Delta) -> int:
        return delta.resident_bytes(self.encoder.anatomy)

    def round(self) -> None:
        """From now on the encoder and its resident deltas compute in bfloat16; there is no way back.

        Raises Unsupported, and changes nothing, where a delta's values are too large for that.
        """
        with self.encoder.lock:
            self.bank.cast(torch.bfloat16)
            self.encoder.round()

    def admit(self, key: str, delta: Delta) -> LoadedDelta:
        delta = self.encoder.fitted(delta)
        self.check(delta)
        head = self.encoder.head(delta.task)
        head.load(delta.head)
        head.share(self.encoder.base_head)
        head.to(self.encoder.device).eval().requires_grad_(False)
        effects = self.encoder.allowed(delta.effects(self.encoder.anatomy))
        with self.encoder.lock:  # no batch runs meanwhile, so nothing is done here but copying rows
            self.free_rows()
            entry = self.bank.add(key, effects, self.encoder.lowest_changed(effects)) if delta.specs else BARE
        return LoadedDelta(delta, task_for(delta.task), head, entry)

    def free(self, key: str) -> None:
        self.bank.remove(key)

    def outputs(self, owned: Sequence[tuple[LoadedDelta, Encoding]]) -> list[Tensor]:
        """Sequences of many deltas in one pass of the encoder: what each one's head gives, [C] for a text and [T, C]
        for its tokens, on the CPU. Raises LimitError for sequences that are too long.

        Sequences of one text share their rows as far as their deltas let them.
        """
        encoder, owners = self.encoder, [ready for ready, _ in owned]
        encodings, entries = [encoding for _, encoding in owned], [ready.entry for ready in owners]
        batch, seats = share(encodings, entries, encoder.depth, encoder.pack)
        return _outputs(self.engine.run(batch, self.bank).float(), batch.last, seats, owners)


def _outputs(hidden: Tensor, batch: PackedBatch, seats: Sequence[int], owners: Sequence[LoadedDelta]) -> list[Tensor]:
    """Each delta's head over its sequences, which are those of the batch at ``seats``; one output a sequence."""
    members: dict[int, list[int]] = {}
    for i, ready in enumerate(owners):
        members.setdefault(id(ready), []).append(i)
    taken = {key: list(dict.fromkeys(seats[i] for i in own)) for key, own in members.items()}  # each seat once
    found = []
    for key, own in members.items():
        ready = owners[own[0]]
        found.append(read(hidden, batch, taken[key], ready.delta.task, ready.head))
    outputs: list[Tensor] = [hidden] * len(owners)
    for (key, own), out in zip(members.items(), _on_cpu(found), strict=True):
        lengths = [batch.text_lengths[seat] for seat in taken[key]]
        parts = torch.split(out, lengths) if owners[own[0]].delta.task.per_token else out.unbind(0)
        answers = dict(zip(taken[key], parts, strict=True))
        for i in own:
            outputs[i] = answers[seats[i]]
    return outputs


def _on_cpu(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors on the CPU, in one copy: every copy waits for the GPU."""
    if tensors[0].device.type == "cpu":
        return tensors
    whole = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = torch.split(whole, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
