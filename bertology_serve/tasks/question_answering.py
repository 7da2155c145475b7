"""Extractive question answering: answers as spans of a context read through windows; gold answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from bertology_serve.errors import DataError
from bertology_serve.tasks.base import Answer, Example, Task
from bertology_serve.tasks.encoding import encode_windows
from bertology_serve.tasks.fields import Record, Records, as_list, kind_of, read_integer, read_text, required
from bertology_serve.tasks.metrics import Floats, of_one, squad_scores
from bertology_serve.tasks.spec import QUESTION_ANSWERING, Encoding

NO_ANSWER = "no-answer"
Rows = tuple[tuple[int, int], ...]
"""First and last row of the answer in each window."""


@dataclass(frozen=True)
class QuestionExample(Example):
    """``answers`` are the gold character spans in the context (none: no answer), None where nothing is known.

    ``top_k`` is how many answers are wanted.
    """

    question: str
    context: str
    answers: tuple[CharSpan, ...] | None = None
    top_k: int = 1


class QuestionAnswering(Task[QuestionExample, Rows]):
    """Records ``{"question", "context", "answers"}``; answers ``answer {text, start, end, score}``.

    Offsets are characters of the context. The score is the softmax over the best spans of all windows. The empty
    answer (text "", start and end 0) may win only where the training data held questions without an answer, which
    the spec's labels say: ``("no-answer",)``. Otherwise there is always an answer. With ``top_k`` in a record, up to
    20 answers come under ``answers``, best first.
    """

    kind = QUESTION_ANSWERING
    main_metric = "f1"

    @classmethod
    def labels_in(cls, records: Records) -> tuple[str, ...]:
        """``("no-answer",)`` when some question has no answer in its context."""
        golds = [read_answers(fields, where, read_text(fields, where, "context")) for fields, where in records]
        return () if all(golds) else (NO_ANSWER,)

    def example(self, record: Record, where: str, labelled: bool) -> QuestionExample:
        question, context = read_text(record, where, "question"), read_text(record, where, "context")
        answers = read_answers(record, where, context) if labelled else None
        top_k = 1 if record.get("top_k") is None else read_integer(record, where, "top_k", 1, CANDIDATES)
        return QuestionExample(where, question, context, answers, top_k)

    def encode(self, example: QuestionExample, tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
        spec = self.spec
        texts = example.question, example.context
        windows = encode_windows(tokenizer, *texts, spec.max_length, spec.stride, of=1, offsets=True, most=None)
        if spec.token_types:
            return windows
        return [replace(window, types=(0,) * len(window)) for window in windows]

    def target(self, example: QuestionExample, encodings: Sequence[Encoding]) -> Rows:
        """(start, end) row of the first gold answer in each window; (0, 0), [CLS], where it is not whole inside."""
        if not example.answers:
            return ((0, 0),) * len(encodings)
        return tuple(rows_of(encoding, example.answers[0]) for encoding in encodings)

    def weight(self, targets: Sequence[Rows]) -> int:
        return sum(map(len, targets))

    def loss(self, out: Tensor, lengths: Sequence[int], targets: Sequence[Rows]) -> Tensor:
        """Mean of the cross-entropies of start and end, summed over windows; out is [T, 2]."""
        gold = torch.tensor([rows for target in targets for rows in target], device=out.device)
        windows = torch.split(out.float(), list(lengths))
        padded = torch.nn.utils.rnn.pad_sequence(list(windows), batch_first=True, padding_value=float("-inf"))
        return F.cross_entropy(padded, gold, reduction="sum") / 2

    def decode(self, example: QuestionExample, encodings: Sequence[Encoding], outputs: Sequence[Tensor]) -> Answer:
        ranked, null = best_spans(example.context, encodings, outputs, self.spec.max_answer_length)
        if NO_ANSWER in self.spec.labels or not ranked:
            ranked = sorted([((0, 0), null), *ranked], key=lambda item: -item[1])
        logits = np.array([score for _, score in ranked])
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        answers = [
            {"text": example.context[start:end], "start": start, "end": end, "score": share}
            for ((start, end), _), share in zip(ranked, shares.tolist(), strict=True)
        ]
        return (
            {"answer": answers[0], "answers": answers[: example.top_k]} if example.top_k > 1 else {"answer": answers[0]}
        )

    def spanned(self, example: QuestionExample) -> str:
        return example.context

    def metrics(self, answers: Sequence[Answer], examples: Sequence[QuestionExample]) -> dict[str, float]:
        """Normalised F1 and exact match of SQuAD, the best over gold answers."""
        golds = [[example.context[start:end] for start, end in example.answers or ()] for example in examples]
        return squad_scores(golds, [answer["answer"]["text"] for answer in answers])

    def parts(self, answers: Sequence[Answer], examples: Sequence[QuestionExample]) -> Floats:
        pairs = zip(answers, examples, strict=True)
        return of_one([self.metrics([answer], [example])["f1"] for answer, example in pairs])


CANDIDATES = 20
CharSpan = tuple[int, int]


def best_spans(
    context: str, encodings: Sequence[Encoding], outputs: Sequence[Tensor], longest: int
) -> tuple[list[tuple[CharSpan, float]], float]:
    """The best spans of a context over all windows, best first, and the score of no answer.

    ``outputs`` are [len, 2] start and end logits a window. A span's score is the sum of its start and end logits, the
    greatest where windows overlap; spans of more than ``longest`` tokens are left out, white space at their ends is
    taken off (byte-level tokens hold the space before a word), and at most 20 come back. No
    answer scores what [CLS] has as start and end, the least over the windows: one window that sees an answer is enough
    (Devlin et al. 2019, arXiv 1810.04805, section 4.3).
    """
    spans: dict[CharSpan, float] = {}
    null = np.inf
    for encoding, output in zip(encodings, outputs, strict=True):
        logits = output.double().numpy()
        null = min(null, float(logits[0].sum()))
        for first, last, score in _candidates(encoding, logits, longest):
            span = trimmed(context, encoding.offsets[first][0], encoding.offsets[last][1])
            if span[0] < span[1]:
                spans[span] = max(score, spans.get(span, -np.inf))
    ranked = sorted(spans.items(), key=lambda item: (-item[1], item[0]))
    return ranked[:CANDIDATES], null


def trimmed(context: str, start: int, end: int) -> CharSpan:
    """The span without white space at its ends; empty when nothing else is in it."""
    text = context[start:end]
    start += len(text) - len(text.lstrip())
    return start, start + len(text.strip())


def rows_of(encoding: Encoding, span: CharSpan) -> tuple[int, int]:
    """First and last row of the context's tokens that touch a character span; (0, 0) when part of it is outside."""
    rows = [row for row, part in enumerate(encoding.parts) if part == 1]
    touching = [row for row in rows if encoding.offsets[row][1] > span[0] and encoding.offsets[row][0] < span[1]]
    whole = rows and encoding.offsets[rows[0]][0] <= span[0] and encoding.offsets[rows[-1]][1] >= span[1]
    return (touching[0], touching[-1]) if whole and touching else (0, 0)


def _candidates(encoding: Encoding, logits: NDArray[np.float64], longest: int) -> list[tuple[int, int, float]]:
    """(first row, last row, score) of a window's best spans."""
    rows = np.flatnonzero(np.asarray(encoding.parts) == 1)
    if not len(rows):
        return []
    starts, ends = logits[rows, 0], logits[rows, 1]
    width = min(longest, len(rows))
    padded = np.concatenate([ends, np.full(width - 1, -np.inf)])
    table = starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, width)
    flat = table.ravel()
    top = np.argsort(-flat, kind="stable")[:CANDIDATES]
    pairs = [(divmod(int(place), width), float(flat[place])) for place in top if flat[place] > -np.inf]
    return [(int(rows[start]), int(rows[start + length]), score) for (start, length), score in pairs]


GoldAnswer = tuple[int, int]


def read_answers(record: Record, where: str, context: str) -> tuple[GoldAnswer, ...]:
    """Character spans (start, end) of the gold answers in the context; empty when there is none.

    ``answers`` may be ``{"text": [...], "answer_start": [...]}``, a list of ``{"text", "answer_start" or "start"}``, a
    list of texts, or one text. Without a start the answer's first occurrence counts; with one that does not fit, the
    occurrence nearest to it. White space at the ends is dropped. An answer that the context lacks is a DataError.
    """
    value = required(record, where, "answers", "answers (an empty list: there is none)")
    spans = (_locate(text, start, where, context) for text, start in _pairs(value, where))
    return tuple(dict.fromkeys(spans))


def _pairs(value: object, where: str) -> list[tuple[object, object]]:
    """(text, start or None) of each answer."""
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start", value.get("start"))
        if isinstance(texts, str):
            return [(texts, starts)]
        said = as_list(texts, where, "answers.text")
        places = [None] * len(said) if starts is None else as_list(starts, where, "answers.answer_start")
        if len(said) != len(places):
            raise DataError(f"{where}: field 'answers' has {len(said)} texts and {len(places)} starts; expected pairs")
        return list(zip(said, places, strict=True))
    if isinstance(value, str):
        return [(value, None)]
    return [_pair(item) for item in as_list(value, where, "answers")]


def _pair(item: object) -> tuple[object, object]:
    if isinstance(item, Mapping):
        return item.get("text"), item.get("answer_start", item.get("start"))
    return item, None


def _locate(text: object, start: object, where: str, context: str) -> GoldAnswer:
    """The span of an answer, checked against the context."""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: field 'answers' holds {kind_of(text)}; expected a text that is not empty")
    if start is not None and (isinstance(start, bool) or not isinstance(start, int)):
        raise DataError(f"{where}: field 'answers' has the start {kind_of(start)}; expected an integer")
    indent = len(text) - len(text.lstrip())
    text = text.strip()
    hint = 0 if start is None else start + indent
    if context[hint : hint + len(text)] == text and hint >= 0:
        return hint, hint + len(text)
    hint = max(hint, 0)
    before, after = context.rfind(text, 0, hint + len(text)), context.find(text, hint)
    found = [place for place in (before, after) if place >= 0]
    if not found:
        raise DataError(f"{where}: field 'answers' holds {kind_of(text)}, which the context does not contain")
    nearest = min(found, key=lambda place: abs(place - hint))
    return nearest, nearest + len(text)
