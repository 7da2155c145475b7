"""What every task provides, and what tasks on a text or a pair share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypeVar

from bertology_serve.errors import DataError, SpecError
from bertology_serve.tasks.encoding import encode_long
from bertology_serve.tasks.fields import Record, Records, optional_text, read_text
from bertology_serve.tasks.metrics import SHARE, Bounds, Floats, ratio
from bertology_serve.tasks.spec import TEXT_KINDS, Encoding, TaskSpec

Answer = dict[str, Any]
Named = tuple[str, int, int]
"""A label and where it stands: the words of a span from first to last, 0 and 0 for a whole text."""


@dataclass(frozen=True)
class Example:
    """One checked record. ``where`` says where it came from (``train.jsonl:17``), for error messages."""

    where: str


E = TypeVar("E", bound=Example, default=Any)
G = TypeVar("G", default=Any)
"""A target: what the loss compares an example's output with."""


class Task(ABC, Generic[E, G]):
    """Turns records into sequences, the head's outputs into answers, and both into losses and metrics.

    ``main_metric`` is the metric that early stopping watches; larger is better. A task holds nothing but its spec and
    may be used from several threads.
    """

    kind: ClassVar[str]
    main_metric: ClassVar[str]

    def __init__(self, spec: TaskSpec) -> None:
        if spec.kind != self.kind:
            raise SpecError(f"the spec is for {spec.kind!r}; expected {self.kind!r}")
        self.spec = spec

    @classmethod
    def labels_in(cls, records: Records) -> tuple[str, ...]:
        """The ``TaskSpec.labels`` that (fields, where) records call for; empty where the task has none."""
        return ()

    @abstractmethod
    def example(self, record: Record, where: str, labelled: bool) -> E:
        """Checks one record. Without ``labelled``, gold fields are ignored.

        Raises DataError, naming ``where`` and the field; fields that the task does not read are ignored.
        """

    @abstractmethod
    def encode(self, example: E, tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
        """The example's sequences, windows of a text in order, each at most ``spec.max_length`` tokens. Thread-safe."""

    @abstractmethod
    def target(self, example: E, encodings: Sequence[Encoding]) -> G:
        """What ``loss`` compares a labelled example with."""

    def weight(self, targets: Sequence[G]) -> int:
        """The number of terms that ``loss`` sums; one an example unless the task says otherwise."""
        return len(targets)

    @abstractmethod
    def loss(self, out: Tensor, lengths: Sequence[int], targets: Sequence[G]) -> Tensor:
        """The sum of the loss terms, a scalar; divide by ``weight`` for their mean.

        ``out`` is the head's output for all texts of all examples in order, windows aggregated: [N, C], [N, H] for
        embeddings; [sum(lengths), C] for tasks that answer for each token. ``lengths`` are text rows a sequence,
        ``targets`` one an example.
        """

    def prior(self, targets: Sequence[G]) -> Tensor | None:
        """The head's output that answers best without reading the text, given the training targets; None: there is
        none worth naming.
        """
        return None

    @abstractmethod
    def decode(self, example: E, encodings: Sequence[Encoding], outputs: Sequence[Tensor]) -> Answer:
        """The answer's fields, ready for JSON. ``outputs`` (float32, on the CPU): [C] or [H] a text, windows
        aggregated; [len, C] a sequence.
        """

    def asks_rows(self, example: E, hidden: int | None) -> bool:
        """Whether an example is answered from the rows of all tokens. Raises DataError where it asks for what rows
        [hidden] do not have; None: their width is not known.
        """
        return False

    def spanned(self, example: E) -> str:
        """The text that the spans of an answer are counted in; empty for tasks that find none."""
        return ""

    def beside(self, example: E) -> Sequence[str]:
        """Texts that are embedded beside the example's own: its labels. Each is one sequence, of ``encode_beside``,
        whose row is the same for every example, so that it may be kept; ``compared`` then makes what is decoded.
        """
        return ()

    def encode_beside(self, text: str, tokenizer: PreTrainedTokenizerBase) -> Encoding:
        """The sequence of one such text; only asked of tasks that have some."""
        raise NotImplementedError

    def compared(self, rows: Tensor, beside: Tensor) -> Tensor:
        """What is decoded of examples' rows [N, H] and those of the texts beside them [K, H]: [N, K]; only asked of
        tasks that have some.
        """
        raise NotImplementedError

    @abstractmethod
    def metrics(self, answers: Sequence[Answer], examples: Sequence[E]) -> dict[str, float]:
        """Metrics of decoded answers against labelled examples, as fractions (0.91, not 91), ``main_metric`` first."""

    @abstractmethod
    def parts(self, answers: Sequence[Answer], examples: Sequence[E]) -> Floats:
        """[N, 2]: what each example brings to the main metric, for ``main``."""

    def main(self, parts: Floats) -> float:
        """The main metric of ``parts`` [N, 2]: the sum of the first column over that of the second."""
        return ratio(*parts.sum(0))

    def bounds(self, parts: Floats) -> Bounds:
        """The least and the greatest value that the main metric of such ``parts`` can have."""
        return SHARE

    def quality(self, answers: Sequence[Answer], examples: Sequence[E]) -> Floats:
        """[N]: how good each answer is, 1 where nothing is wrong; the least are the worst."""
        part, whole = self.parts(answers, examples).T
        return np.where(whole > 0, part / np.maximum(whole, 1e-12), 1.0)

    def named(self, answers: Sequence[Answer], examples: Sequence[E]) -> list[tuple[set[Named], set[Named]]]:
        """For each example the labels, each at its place, that are right and those that the answer names; empty for
        tasks without labels.
        """
        return []


@dataclass(frozen=True, slots=True)
class Item:
    """An example, its sequences, and what the loss compares them with where it is labelled."""

    example: Example
    encodings: tuple[Encoding, ...]
    target: Any

    @property
    def tokens(self) -> int:
        return sum(map(len, self.encodings))

    @property
    def longest(self) -> int:
        return max(map(len, self.encodings))


def make_items(
    task: Task, records: Iterable[tuple[Record, str]], tokenizer: PreTrainedTokenizerBase, labelled: bool = True
) -> list[Item]:
    """Checks and tokenises (fields, where) records once. Raises DataError naming the first that is wrong."""
    items = []
    for fields, where in records:
        example = task.example(fields, where, labelled)
        encodings = tuple(task.encode(example, tokenizer))
        items.append(Item(example, encodings, task.target(example, encodings) if labelled else None))
    if not items:
        raise DataError("no records were found; expected at least one")
    return items


@dataclass(frozen=True)
class TextExample(Example):
    """One text, or a text and its pair."""

    text: str
    text_pair: str | None


T = TypeVar("T", bound=TextExample, default=Any)


class TextTask(Task[T, G]):
    """A task whose sequence is a text or a pair."""

    def texts(self, record: Record, where: str) -> tuple[str, str | None]:
        """The texts of a record; raises DataError for a single one where the spec says pairs."""
        text, pair = read_pair(record, where)
        if self.spec.pairs and pair is None:
            raise DataError(f"{where}: field 'text_pair' is missing; this delta was trained on pairs of texts")
        return text, pair

    def encode(self, example: T, tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
        return encode_long(tokenizer, example.text, example.text_pair, self.spec)


def all_pairs(kind: str, records: Records) -> bool:
    """The ``TaskSpec.pairs`` of (fields, where) records that a task of that kind is trained on."""
    if kind not in TEXT_KINDS:
        return False
    return all(optional_text(fields, where, "text_pair", "text_b") is not None for fields, where in records)


def read_pair(record: Record, where: str) -> tuple[str, str | None]:
    """``text`` and ``text_pair`` of a record; ``text_a`` and ``text_b`` mean the same."""
    text = read_text(record, where, "text", "text_a")
    return text, optional_text(record, where, "text_pair", "text_b")
