"""Token classification: one tag a word, read from its first subword; spans of tags; how texts are cut into words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from bertology_serve.errors import DataError
from bertology_serve.tasks.base import Answer, Example, Named, Task
from bertology_serve.tasks.encoding import MOST_WINDOWS, word_windows
from bertology_serve.tasks.fields import Record, Records, read_tags, read_text, read_texts, sorted_labels
from bertology_serve.tasks.metrics import Floats, accuracy, ratio
from bertology_serve.tasks.spec import IGNORED, TOKEN_CLASSIFICATION, Encoding, TaskSpec

MOST_WORDS = 1_000_000


@dataclass(frozen=True)
class TokensExample(Example):
    """A text and the character spans of its words; ``split`` says that the words came apart (``tokens``).

    ``tags`` are the gold tags, one a word, None where a word has none; None where nothing is known.
    """

    text: str
    spans: tuple[Span, ...]
    split: bool
    tags: tuple[str | None, ...] | None = None


class TokenClassification(Task[TokensExample, tuple[int, ...]]):
    """Records ``{"tokens", "tags"}``, or ``{"text"}`` where only an answer is wanted (cut as ``words`` says).

    Answers ``entities [{label, start, end, text, score}]``, where offsets are characters of the text, or of the tokens
    joined by one space, and the score is the mean probability of the entity's tags; for ``tokens`` also ``tags``, one
    a token. Words that the maximum length cuts off are tagged ``O``. A gold tag of -100 says that its word has none:
    it is no class, teaches nothing, and is left out of the metrics.
    """

    kind = TOKEN_CLASSIFICATION
    main_metric = "f1"

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.index = {label: index for index, label in enumerate(spec.labels)}

    @classmethod
    def labels_in(cls, records: Records) -> tuple[str, ...]:
        """The tags found, ``O`` first."""
        found = {tag for fields, where in records for tag in read_tags(fields, where) if tag is not None}
        return sorted_labels({"O"} & found) + sorted_labels(found - {"O"})

    def example(self, record: Record, where: str, labelled: bool) -> TokensExample:
        if record.get("tokens") is None and not labelled:
            text = read_text(record, where, "text", "text_a")
            return TokensExample(where, text, tuple(split_words(text)), False)
        words = read_texts(record, where, "tokens", 1, MOST_WORDS)
        text, spans = join_words(words)
        tags = None
        if labelled:
            tags = tuple(read_tags(record, where, self.index))
            if len(tags) != len(words):
                raise DataError(f"{where}: field 'tags' has {len(tags)} items; expected {len(words)}, one a token")
        return TokensExample(where, text, tuple(spans), True, tags)

    def encode(self, example: TokensExample, tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
        words, starts = [example.text[start:end] for start, end in example.spans], [start for start, _ in example.spans]
        most = MOST_WINDOWS if self.spec.long == "windows" else 1
        return word_windows(tokenizer, words, starts, self.spec.max_length, self.spec.stride, most)

    def target(self, example: TokensExample, encodings: Sequence[Encoding]) -> tuple[int, ...]:
        """The tag's index on each word's first subword, -100 on all other rows and where there is none."""
        target = [IGNORED] * sum(map(len, encodings))
        for word, row in _first_rows(encodings).items():
            tag = (example.tags or ())[word]
            target[row] = IGNORED if tag is None else self.index[tag]
        return tuple(target)

    def weight(self, targets: Sequence[tuple[int, ...]]) -> int:
        return sum(index != IGNORED for target in targets for index in target)

    def loss(self, out: Tensor, lengths: Sequence[int], targets: Sequence[tuple[int, ...]]) -> Tensor:
        """Cross-entropy of the labelled rows of out [T, C]."""
        gold = torch.tensor([index for target in targets for index in target], device=out.device)
        return F.cross_entropy(out.float(), gold, ignore_index=IGNORED, reduction="sum")

    def decode(self, example: TokensExample, encodings: Sequence[Encoding], outputs: Sequence[Tensor]) -> Answer:
        tags, scores = self._tagged(example, encodings, torch.cat(list(outputs)))
        entities = []
        for label, first, last in spans_of(tags):
            start, end = example.spans[first][0], example.spans[last - 1][1]
            entity = {"label": label, "start": start, "end": end, "text": example.text[start:end]}
            entities.append({**entity, "score": sum(scores[first:last]) / (last - first)})
        return {"entities": entities, "tags": tags} if example.split else {"entities": entities}

    def spanned(self, example: TokensExample) -> str:
        return example.text

    def metrics(self, answers: Sequence[Answer], examples: Sequence[TokensExample]) -> dict[str, float]:
        """F1, precision and recall of entities, and the accuracy of tags, over the words that have a gold tag."""
        gold, found = _known(answers, examples)
        return {**span_scores(gold, found), "accuracy": accuracy(list(chain(*gold)), list(chain(*found)))}

    def parts(self, answers: Sequence[Answer], examples: Sequence[TokensExample]) -> Floats:
        counts = [_span_counts(*tags) for tags in zip(*_known(answers, examples), strict=True)]
        return np.array([[2.0 * right, expected + given] for right, expected, given in counts])

    def named(
        self, answers: Sequence[Answer], examples: Sequence[TokensExample]
    ) -> list[tuple[set[Named], set[Named]]]:
        return [
            (set(spans_of(gold)), set(spans_of(found))) for gold, found in zip(*_known(answers, examples), strict=True)
        ]

    def _tagged(
        self, example: TokensExample, encodings: Sequence[Encoding], out: Tensor
    ) -> tuple[list[str], list[float]]:
        """A tag and its probability for each word; ``O`` at probability 1 for words without a row."""
        tags, scores = ["O"] * len(example.spans), [1.0] * len(example.spans)
        rows = _first_rows(encodings)
        best = out[list(rows.values())].double().softmax(1).max(1)
        for word, score, index in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
            tags[word], scores[word] = self.spec.labels[index], score
        return tags, scores


def _known(answers: Sequence[Answer], examples: Sequence[TokensExample]) -> tuple[list[list[str]], list[list[str]]]:
    """The gold tags and those found, a list a sentence, of the words that have a gold tag."""
    pairs = [
        [(gold, found) for gold, found in zip(example.tags or (), answer["tags"], strict=True) if gold is not None]
        for answer, example in zip(answers, examples, strict=True)
    ]
    return [[gold for gold, _ in pair] for pair in pairs], [[found for _, found in pair] for pair in pairs]


def _first_rows(encodings: Sequence[Encoding]) -> dict[int, int]:
    """Word -> the row of its first subword among those of all windows, for words that have one, in order."""
    rows: dict[int, int] = {}
    for row, word in enumerate(chain.from_iterable(encoding.words for encoding in encodings)):
        if word >= 0 and word not in rows:
            rows[word] = row
    return rows


TagSpan = tuple[str, int, int]
OUTSIDE = ("O", "0")
PREFIXES = {"B": "B", "I": "I", "E": "E", "S": "S", "M": "I", "L": "E", "U": "S"}
"""Those of IOB and IOBES, and what they are called in BMES and BILOU."""


def spans_of(tags: Sequence[str]) -> list[TagSpan]:
    """(label, first word, word after the last) of each span.

    ``B-`` starts a span, and so does ``I-`` after ``O`` or after another label; ``E-`` ends and ``S-`` is a span of
    its own (BILOU calls them ``L-`` and ``U-``; BMES has ``M-`` for ``I-``). A tag without prefix counts as ``I-`` of
    itself, so runs of one part-of-speech tag are spans too; but for ``0``, which is ``O`` where tags are class indices.
    """
    spans: list[TagSpan] = []
    previous, label, start = "O", "", 0
    for index, tag in enumerate([*tags, "O"]):
        prefix, kind = split_tag(tag)
        begins = prefix != "O" and (prefix in "BS" or previous in "OES" or kind != label)
        if previous != "O" and (begins or prefix == "O"):
            spans.append((label, start, index))
        if begins:
            start = index
        previous, label = prefix, kind
    return spans


def split_tag(tag: str) -> tuple[str, str]:
    """A tag's prefix (one of B, I, E, S, O) and its label."""
    if tag in OUTSIDE:
        return "O", ""
    if len(tag) > 2 and tag[1] == "-" and tag[0] in PREFIXES:
        return PREFIXES[tag[0]], tag[2:]
    return "I", tag


def span_scores(gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro F1, precision and recall of spans over sentences: a span counts when label and both ends agree."""
    counts = [_span_counts(*tags) for tags in zip(gold, found, strict=True)]
    right, expected, given = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)
    return {
        "f1": ratio(2 * right, given + expected),
        "precision": ratio(right, given),
        "recall": ratio(right, expected),
    }


def _span_counts(gold: Sequence[str], found: Sequence[str]) -> tuple[int, int, int]:
    """Spans of one sentence: found and right, expected, found."""
    gold_spans, found_spans = set(spans_of(gold)), set(spans_of(found))
    return len(gold_spans & found_spans), len(gold_spans), len(found_spans)


Span = tuple[int, int]

_MARKS = "".join(chr(code) for code in range(0x300, 0x3100) if unicodedata.category(chr(code)).startswith("M"))
_IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_RUN = rf"(?:(?![{_IDEOGRAPHS}])[\w{_MARKS}\u200c\u200d])+"
_CLITIC = r"['\u2019](?:s|m|d|re|ve|ll)\b"
_WORD = re.compile(
    rf"""(?:https?://|www\.)\S*[^\s.,;:!?)\]}}>"'\u2019]
    | (?<!\w)[@\#]{_RUN}
    | (?<!\w)(?:[^\W\d_]\.){{2,}}
    | (?<!\w)\d+(?:[.,:]\d+)+(?!\w)
    | (?<=\w){_CLITIC}
    | {_RUN}(?:(?!{_CLITIC})[-'\u2019]{_RUN})*
    | \S""",
    re.VERBOSE | re.IGNORECASE,
)


def split_words(text: str) -> list[Span]:
    """Character spans of the words of a text, in order."""
    return [match.span() for match in _WORD.finditer(text)]


def join_words(words: tuple[str, ...]) -> tuple[str, list[Span]]:
    """The words joined by one space, and the character span of each."""
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(words), spans
