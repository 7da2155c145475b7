"""What is analysed: an encoder, alone or with one delta applied, and the texts that it is run on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from bertology_serve import examples
from bertology_serve.data.formats import Fields, read_lines
from bertology_serve.data.records import DataLike, Record, name_of, read_records
from bertology_serve.deltas.catalog import newest
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.layout import check_base
from bertology_serve.encoder.attention import Group
from bertology_serve.encoder.bank import BARE, BankEntry, LiveBank
from bertology_serve.encoder.batch import PackedBatch, read
from bertology_serve.encoder.encoder import Encoder, weights_hash
from bertology_serve.encoder.forward_context import HeadAttention
from bertology_serve.encoder.opening import load_delta, open_delta
from bertology_serve.errors import BaseMismatch, DataError, NotFound, SpecError, Unsupported
from bertology_serve.files import JsonObject
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.base import Item, Task, make_items
from bertology_serve.tasks.encoding import encode_text, encode_words
from bertology_serve.tasks.heads import Head, aggregate, outputs_of
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import WHOLE_BATCH, Encoding
from bertology_serve.tasks.token_classification import join_words

KEY = "subject"
Advance = Callable[[int, int], None]  # (sequences done, of so many)
DeltaLike = Delta | str | Path | None


def silent(done: int, total: int) -> None:
    """Watches nothing."""


@dataclass(frozen=True)
class Subject:
    """An encoder with at most one delta; its passes keep nothing between batches."""

    encoder: Encoder
    delta: Delta | None = None

    @classmethod
    def of(cls, encoder: EncoderLike, delta: DeltaLike = None, device: str = "cpu") -> Subject:
        """From names, directories or what is already loaded; without ``encoder`` the one that the delta names.

        Raises NotFound, FormatError, and BaseMismatch for a delta of other weights.
        """
        if isinstance(encoder, Subject):
            return encoder
        if isinstance(encoder, Encoder):
            own = load_delta(newest(Path(delta)), encoder) if isinstance(delta, (str, Path)) else delta
            return cls(encoder, own).checked()
        if encoder is not None and not isinstance(encoder, str | Path):
            raise SpecError(
                f"an analysis got a {type(encoder).__name__}; expected an Encoder, its name or its directory"
            )
        name = None if encoder is None else str(encoder)
        if isinstance(delta, (str, Path)):
            own, encoder = open_delta(Path(delta), name, device)
            return cls(encoder, own).checked()
        if delta is None:
            return cls(Encoder.load(name or "minilm", device=device))
        return cls(Encoder.for_delta(delta, name, device=device), delta).checked()

    def checked(self) -> Subject:
        """Itself, the delta fitted to a pruned encoder; raises BaseMismatch where it was made for other weights."""
        if self.delta is None:
            return self
        delta = self.encoder.fitted(self.delta)
        if not delta.weights:
            check_base(delta, self.encoder.ref)
        elif weights_hash(delta.weights) != self.encoder.ref.sha256:
            raise BaseMismatch(f"delta {delta.name!r} is a whole checkpoint; give no other encoder with it")
        return replace(self, delta=delta)

    @property
    def name(self) -> str:
        """``minilm`` or ``minilm + sentiment``."""
        return self.encoder.name if self.delta is None else f"{self.encoder.name} + {self.delta.name}"

    @cached_property
    def pools(self) -> LiveBank:
        if self.delta is None or not self.delta.specs:
            return LiveBank([])
        device, dtype = self.encoder.device, self.encoder.dtype
        with torch.inference_mode(False), torch.no_grad():  # made once, used with and without gradients
            moved = {name: tensor.to(device, dtype) for name, tensor in self.delta.tensors.items()}
            effects = replace(self.delta, tensors=moved).effects(self.encoder.anatomy)
            return LiveBank([(KEY, self.encoder.allowed(effects))])

    @property
    def virtual(self) -> int:
        """Rows that the delta's prompt or prefix takes of the encoder's positions, at most."""
        return self.entry.prompt_length + self.entry.prefix_length

    def longest(self, length: int) -> int:
        """A length in tokens, or the longest text that encoder and delta leave room for."""
        return min(length, self.encoder.max_tokens - self.virtual)

    @property
    def entry(self) -> BankEntry:
        return self.pools.entries.get(KEY, BARE)

    @cached_property
    def head(self) -> Head:
        """The delta's task head, frozen."""
        assert self.delta is not None
        with torch.inference_mode(False):
            head = self.encoder.head(self.delta.task)
            head.load(self.delta.head)
            return head.to(self.encoder.device).eval().requires_grad_(False)

    def pack(self, encodings: Sequence[Encoding]) -> PackedBatch:
        return self.encoder.pack(encodings, [self.entry] * len(encodings))

    def run(self, batch: PackedBatch, heads: HeadAttention | None = None) -> Tensor:
        """The last hidden states [T, H]."""
        return self.encoder.run(batch, self.pools, heads=heads)

    def passes(
        self, encodings: Sequence[Encoding], max_tokens: int
    ) -> Iterator[tuple[Sequence[int], PackedBatch, dict[int, Tensor]]]:
        """Batches of the sequences with the hidden states [T, H] of every layer; see ``Encoder.layer_rows``."""
        groups = batches([len(encoding) for encoding in encodings], max_tokens)
        layers = range(self.encoder.anatomy.layers + 1)
        return self.encoder.layer_rows(self.pools, self.entry, encodings, groups, layers)

    def facts(self) -> JsonObject:
        base, delta = self.encoder.ref, self.delta
        own = None if delta is None else {"name": delta.name, "version": delta.version, "kinds": list(delta.kinds)}
        return {"base": base.name, "family": base.family, "sha256": base.sha256, "delta": own}


EncoderLike = str | Path | Encoder | Subject | None


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indexes of sequences, shortest first, in batches of at most ``max_tokens`` padded rows (or one sequence)."""
    waiting: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if waiting and (len(waiting) + 1) * lengths[index] > max_tokens:
            yield waiting
            waiting = []
        waiting.append(index)
    if waiting:
        yield waiting


def head_numbers(anatomy: Anatomy) -> list[int]:
    """The flat numbers, ``layer * heads + head``, of the heads that there are: all of them, unless it was pruned."""
    return [layer * anatomy.heads + head for layer in range(anatomy.layers) for head in range(anatomy.heads_of(layer))]


def mapped(values: Tensor, numbers: Sequence[int]) -> list[list[float | None]]:
    """Values [L, heads] for a heat-map: nothing where a pruned layer has no head."""
    there = set(numbers)
    return [
        [value if layer * len(row) + head in there else None for head, value in enumerate(row)]
        for layer, row in enumerate(values.tolist())
    ]


def text_rows(batch: PackedBatch) -> tuple[Tensor, ...]:
    """For each packed sequence, the numbers of its text rows."""
    return torch.split(batch.text_rows, list(batch.text_lengths))


_PAIRS = (("text", "text_pair"), ("text_a", "text_b"), ("premise", "question"), ("question", "context"))


def data_name(data: DataLike | None) -> str:
    """What a report calls its data; ``None`` are the built-in examples."""
    if data is None or isinstance(data, (str, Path)):
        return "built-in examples" if data is None else str(data)
    return f"{len(data)} texts" if _are_texts(data) else name_of(data)


def _are_texts(data: DataLike) -> TypeGuard[Sequence[str]]:
    return isinstance(data, Sequence) and all(isinstance(text, str) for text in data)


def read_texts(
    texts: DataLike | None, tokenizer: PreTrainedTokenizerBase, max_length: int, most: int | None = None
) -> list[Encoding]:
    """Tokenised sequences of at most ``max_length`` tokens: a line each of ``.txt``, else a record each.

    ``None`` are the built-in examples, a list may hold the texts themselves; ``most`` takes the first so many. Raises
    NotFound, and DataError for records without a text.
    """
    if texts is None:
        texts = examples.path("sentiment", "dev")
    if isinstance(texts, (str, Path)) and Path(texts).suffixes[:1] == [".txt"]:
        rows = _lines(Path(texts))
    elif not isinstance(texts, (str, Path)) and _are_texts(texts):
        rows = [Record({"text": text}, f"text {i}") for i, text in enumerate(texts)]
    else:
        rows = read_records(texts)
    if not rows:
        raise DataError(f"{data_name(texts)}: holds no text; expected at least one line")
    return [_encode(fields, where, tokenizer, max_length) for fields, where in rows[:most]]


def _lines(path: Path) -> list[Record]:
    if not path.exists():
        raise NotFound(f"no file {path}; give a file that exists, or none for the built-in examples")
    return [Record({"text": line.strip()}, f"{path}:{number}") for number, line in read_lines(path) if line.strip()]


def _encode(fields: Fields, where: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoding:
    if isinstance(fields.get("tokens"), list):
        words = [str(word) for word in fields["tokens"]]
        _, spans = join_words(tuple(words))
        return encode_words(tokenizer, words, [start for start, _ in spans], max_length)
    for first, second in _PAIRS:
        if isinstance(fields.get(first), str):
            pair = fields.get(second)
            return encode_text(tokenizer, fields[first], pair if isinstance(pair, str) else None, max_length)
    raise DataError(f"{where}: no text; expected a field text, text_a, tokens, question or premise")


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
        assert self.subject.delta is not None
        return read(self.subject.run(batch, heads), batch, batch.places, self.subject.delta.task, self.subject.head)

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
