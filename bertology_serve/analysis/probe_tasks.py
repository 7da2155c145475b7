"""What probes are asked to read: labels of whole texts and of single words, and control labels beside them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from bertology_serve.data.records import Record
from bertology_serve.errors import DataError, SpecError, nearest
from bertology_serve.tasks.encoding import encode_words
from bertology_serve.tasks.fields import read_tags
from bertology_serve.tasks.spec import Encoding
from bertology_serve.tasks.token_classification import join_words, split_words

LENGTH, POSITION, CONTENT, TAGS, DEPTH, LABEL = "length", "position", "content", "tags", "depth", "label"
TASKS = (LENGTH, POSITION, CONTENT, TAGS, DEPTH, LABEL)
OF_WORDS = (POSITION, TAGS, DEPTH)
LENGTH_CLASSES, POSITIONS, DEEPEST = 6, 10, 6
CONTENT_WORDS, CONTENT_TEXTS, CONTENT_SHARE = 20, 10, 0.1  # words, texts that each needs, share of texts it may reach


@dataclass(frozen=True)
class ProbeText:
    """A record made ready: its words, its sequence, and the first row of each word that the length left.

    A tag of None says that its word has none.
    """

    words: tuple[str, ...]
    encoding: Encoding
    rows: Mapping[int, int]
    tags: tuple[str | None, ...] | None
    label: str | None
    depths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ProbeItem:
    """One thing to read: text number, its row (0 for whole texts), the answer, and the type that controls go by."""

    text: int
    row: int
    answer: str
    type: str


def make_text(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> ProbeText:
    """From ``tokens`` (with ``tags``) or ``text`` (cut into words); raises DataError for pairs and other records."""
    fields, where = record
    words = fields.get("tokens")
    if words is None:
        text = fields.get("text", fields.get("text_a"))
        if not isinstance(text, str) or fields.get("text_pair", fields.get("text_b")) is not None:
            raise DataError(f"{where}: expected one field text, or tokens; probes read single texts")
        words = [text[start:end] for start, end in split_words(text)]
    if not words or not all(isinstance(word, str) for word in words):
        raise DataError(f"{where}: no words; expected a text or a list of tokens")
    _, spans = join_words(tuple(words))
    encoding = encode_words(tokenizer, words, [start for start, _ in spans], max_length)
    rows: dict[int, int] = {}
    for row, word in enumerate(encoding.words):
        if word >= 0:
            rows.setdefault(word, row)
    tags, label = None if fields.get("tags") is None else read_tags(fields, where), fields.get("label")
    if tags is not None and len(tags) != len(words):
        raise DataError(f"{where}: field 'tags' has {len(tags)} items; expected {len(words)}, one a token")
    depths = _depths(fields["heads"], where) if isinstance(fields.get("heads"), list) else None
    named = None if label is None else str(label)
    return ProbeText(tuple(words), encoding, rows, None if tags is None else tuple(tags), named, depths)


def _depths(heads: Sequence[int], where: str) -> tuple[int, ...]:
    """How many steps each word stands below the root; raises DataError for what is no tree."""
    found = []
    for word in range(len(heads)):
        at, steps = word, 0
        while heads[at] and steps <= len(heads):
            at, steps = heads[at] - 1, steps + 1
        if steps > len(heads):
            raise DataError(f"{where}: the heads of word {word + 1} go in a circle; expected a tree")
        found.append(steps)
    return tuple(found)


def chosen(asked: Sequence[str] | None, texts: Sequence[ProbeText]) -> tuple[str, ...]:
    """The probes asked for, or all that the texts can answer; raises SpecError for others."""
    lacking = {
        TAGS: any(text.tags is None for text in texts),
        LABEL: any(text.label is None for text in texts),
        DEPTH: any(text.depths is None for text in texts),
        CONTENT: len(content_words(texts)) < 2,
    }
    fields = {TAGS: "a field 'tags' in every record", LABEL: "a field 'label' in every record",
              DEPTH: "a field 'heads' in every record (CoNLL-U)",
              CONTENT: f"two words that occur in {CONTENT_TEXTS} texts each, and not in many"}  # fmt: skip
    for name in asked or ():
        if name not in TASKS:
            raise SpecError(f"unknown probe {name!r}; {nearest(name, TASKS)}")
        if lacking.get(name):
            raise SpecError(f"the probe {name!r} needs {fields[name]}; expected that, or other --tasks")
    return tuple(asked) if asked else tuple(name for name in TASKS if not lacking.get(name))


def length_edges(texts: Sequence[ProbeText]) -> list[float]:
    """Upper ends of up to six classes of words a text, equally full (Conneau et al. 2018 have six, too)."""
    quantiles = np.quantile([len(text.words) for text in texts], np.arange(1, LENGTH_CLASSES) / LENGTH_CLASSES)
    return sorted(set(quantiles.tolist()))


def content_words(texts: Sequence[ProbeText]) -> list[str]:
    """Up to twenty words, the commonest of those in ten texts or more, yet in at most a tenth of them."""
    counts = Counter(word for text in texts for word in {word.lower() for word in text.words} if word.isalpha())
    most = CONTENT_SHARE * len(texts)
    fitting = [(-count, word) for word, count in counts.items() if CONTENT_TEXTS <= count <= most]
    return [word for _, word in sorted(fitting)[:CONTENT_WORDS]]


def items(task: str, texts: Sequence[ProbeText], edges: Sequence[float], words: Sequence[str] = ()) -> list[ProbeItem]:
    """Everything that a probe is asked about those texts; ``words`` are those of ``content``.

    ``content`` (Conneau et al. 2018): which one of those words a text holds, for the texts that hold exactly one.
    """
    if task in OF_WORDS:
        return [
            ProbeItem(number, row, _of_word(task, text, word), text.words[word])
            for number, text in enumerate(texts)
            for word, row in text.rows.items()
            if (task != POSITION or word < POSITIONS) and not (task == TAGS and (text.tags or ())[word] is None)
        ]
    if task == CONTENT:
        held = [{word.lower() for word in text.words} & set(words) for text in texts]
        return [ProbeItem(n, 0, next(iter(own)), texts[n].words[0]) for n, own in enumerate(held) if len(own) == 1]
    answers: list[int | str | None] = [
        int(np.searchsorted(edges, len(text.words))) if task == LENGTH else text.label for text in texts
    ]
    return [
        ProbeItem(n, 0, str(answer), text.words[0]) for n, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]


def _of_word(task: str, text: ProbeText, word: int) -> str:
    if task == DEPTH:
        return str(min((text.depths or ())[word], DEEPEST))
    return str(word if task == POSITION else (text.tags or ())[word])


def sampled(found: list[ProbeItem], most: int, seed: int) -> list[ProbeItem]:
    """At most so many items, drawn from a seed, in order."""
    if len(found) <= most:
        return found
    return [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), most))]


class Control:
    """A control task (Hewitt and Liang 2019, arXiv 1909.03368): every word type has one answer, drawn at random.

    Answers are drawn from those of the real task as often as they occur. For whole texts the type is the first word.
    """

    def __init__(self, train: Sequence[ProbeItem], seed: int) -> None:
        counts = sorted(Counter(item.answer for item in train).items())
        self.answers, self.weights = [a for a, _ in counts], [n for _, n in counts]
        self.seed = seed

    def answer(self, item: ProbeItem) -> str:
        """The type's answer, whatever the text."""
        return random.Random(f"{self.seed} {item.type}").choices(self.answers, self.weights)[0]
