"""Real inputs for the verifier, in every shape, and what the torch engine answers to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.bank import BARE
from bertology_serve.encoder.batch import read
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.tasks.encoding import encode_text
from bertology_serve.tasks.spec import Encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTENCES = (
    "The ferry leaves at seven, and the last bus to the harbour is always late.",
    "Ada Lovelace wrote about the Analytical Engine while living in London.",
    "I would not recommend this kettle: it leaks, it screams, and it takes four minutes.",
    "What a lovely film; my grandmother laughed louder than the children did.",
    "How do I change the address on my account?",
    "Rainfall in the valley fell by 12.5 % between 1998 and 2004, the report says.",
    "Nobody answered.",
    "The committee, having read both letters twice, decided that neither needed a reply.",
    "Please cancel my order #4471-B and refund the card ending in 0932.",
    "She tuned the old piano by ear, one string at a time, until the whole house hummed.",
    "Müller's bakery in Zürich sells rye, spelt and, on Sundays, a braided loaf.",
    "If the pump stops, close the red valve first and the blue one only after the gauge reads zero.",
)
STEPS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987)
BATCHES = (1, 3, 5, 8)
RECORDS, MAX_ROWS = 8, 2_048


@dataclass(frozen=True)
class Case:
    """A batch as a client would send it: ``encodings`` padded on one side to ``length`` columns."""

    encodings: tuple[Encoding, ...]
    length: int
    left: bool

    @property
    def shape(self) -> str:
        """``batch×length padding``."""
        side = "left" if self.left else "right"
        return f"{len(self.encodings)}×{self.length} {side}"

    def arrays(self, pad: int) -> dict[str, NDArray[np.int64]]:
        """``input_ids``, ``attention_mask`` and ``token_type_ids``, int64 [B, L]."""
        table = np.zeros((3, len(self.encodings), self.length), dtype=np.int64)
        table[0] = pad
        for row, encoding in enumerate(self.encodings):
            at = self.columns(row)
            table[0, row, at], table[1, row, at], table[2, row, at] = encoding.ids, 1, encoding.types
        return {"input_ids": table[0], "attention_mask": table[1], "token_type_ids": table[2]}

    def untyped(self) -> Case:
        """The same with all tokens of type 0."""
        encodings = tuple(Encoding(one.ids, (0,) * len(one.ids)) for one in self.encodings)
        return replace(self, encodings=encodings)

    def alone(self, row: int) -> Case:
        """One sequence of it, without padding."""
        return Case((self.encodings[row],), len(self.encodings[row]), left=False)

    def columns(self, row: int) -> slice:
        """Where a row's tokens stand."""
        size = len(self.encodings[row])
        return slice(self.length - size, self.length) if self.left else slice(0, size)


def built_in(tokenizer: PreTrainedTokenizerBase, longest: int) -> Iterator[Case]:
    """Batches of 1 to 8 sequences of mixed lengths, at least 16 shapes, 1×1 first and 2×``longest`` last."""
    lengths = [n for n in STEPS if n < longest] + [longest]
    texts = Texts(tokenizer)
    shapes = [(batch, n) for batch in BATCHES for n in lengths if batch == 1 or n <= max(8, longest // 8)]
    sides = [(batch, n, i % 2 == 1) for i, (batch, n) in enumerate(shapes)]
    for batch, n, left in [*sides, *((2, n, left) for n in lengths for left in (False, True))]:
        mixed = [max(1, n * (batch - row) // batch) for row in range(batch)]
        yield Case(tuple(texts.encoding(size) for size in mixed), n, left)


def of_encodings(encodings: Iterable[Sequence[Encoding]]) -> Iterator[Case]:
    """A caller's own records in batches as they come, padded right and left in turn; at most 2,048 sequences."""
    flat = islice((one for record in encodings for one in record), MAX_ROWS)
    for i in range(MAX_ROWS):
        batch = tuple(islice(flat, RECORDS))
        if not batch:
            return
        yield Case(batch, max(map(len, batch)), left=i % 2 == 1)


class Texts:
    """Cuts encodings of any length out of the sentences."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self._made = tokenizer, 0

    def encoding(self, length: int) -> Encoding:
        """An encoding of exactly ``length`` tokens; every third longer one is a pair of texts."""
        start, count = self._made, len(SENTENCES)
        self._made += 1
        words = " ".join(SENTENCES[(start + i) % count] for i in range(1 + length // 8))
        pair = SENTENCES[(start + 5) % count] if start % 3 == 2 and length > 8 else None
        found = encode_text(self.tokenizer, words, pair, length)
        while len(found) < length:
            words += " " + words
            found = encode_text(self.tokenizer, words, pair, length)
        return Encoding(found.ids[:length], found.types[:length])


class Reference:
    """One delta on the engine that serves it. Raises what ``Pipeline.add`` raises: BaseMismatch, LimitError."""

    def __init__(self, encoder: Encoder, delta: Delta) -> None:
        self.encoder, self.delta, self.task = encoder, delta, delta.task
        self._pipeline = Pipeline(encoder)
        self._pipeline.add(delta)
        self._entry = next(iter(self._pipeline.bank.entries.values()), BARE)
        self._head = encoder.head(delta.task)
        self._head.load(delta.head)
        self._head.eval()

    @torch.inference_mode()
    def outputs(self, encodings: Sequence[Encoding]) -> list[Tensor]:
        """[C], for tasks that answer for every token [len, C], for embeddings [H] as the task normalises them,
        of sparse [V]."""
        encoder = self.encoder
        entries = [self._entry] * len(encodings)
        batch = encoder.pack(encodings, entries)
        hidden = encoder.run(batch, self._pipeline.bank)
        packed = batch.places
        out = read(hidden, batch, packed, self.task, self._head)
        if self.task.unit:
            out = F.normalize(out, dim=-1)
        parts = torch.split(out, [batch.text_lengths[i] for i in packed]) if self.task.per_token else out.unbind(0)
        return [part.cpu() for part in parts]
