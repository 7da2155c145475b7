"""Extractive question answering: start and end of the answer in a context, read through overlapping windows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from bertology_serve.errors import SpecError
from bertology_serve.tasks.answer_spans import CANDIDATES, CharSpan, best_spans, rows_of
from bertology_serve.tasks.base import Answer, Example, Task
from bertology_serve.tasks.encoding import encode_windows
from bertology_serve.tasks.fields import read_integer, read_text
from bertology_serve.tasks.gold_answers import read_answers
from bertology_serve.tasks.spec import QUESTION_ANSWERING, Encoding, TaskSpec
from bertology_serve.tasks.squad import squad_scores

NO_ANSWER = "no-answer"
LEAST_LENGTH = 8


@dataclass(frozen=True)
class QuestionExample(Example):
    """``answers`` are the gold character spans in the context (none: no answer), None where nothing is known.

    ``top_k`` is how many answers are wanted.
    """

    question: str
    context: str
    answers: tuple[CharSpan, ...] | None = None
    top_k: int = 1


class QuestionAnswering(Task[QuestionExample]):
    """Records ``{"question", "context", "answers"}``; answers ``answer {text, start, end, score}``.

    Offsets are characters of the context. The score is the softmax over the best spans of all windows. The empty
    answer (text "", start and end 0) may win only where the training data held questions without an answer, which
    the spec's labels say: ``("no-answer",)``. Otherwise there is always an answer. With ``top_k`` in a record, up to
    20 answers come under ``answers``, best first.
    """

    kind = QUESTION_ANSWERING
    main_metric = "f1"

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        if spec.max_length < LEAST_LENGTH:
            raise SpecError(f"max_length is {spec.max_length}; question answering needs at least {LEAST_LENGTH} tokens")

    @classmethod
    def labels_in(cls, records: Iterable[tuple[Mapping[str, Any], str]]) -> tuple[str, ...]:
        """``("no-answer",)`` when some question has no answer in its context."""
        golds = [read_answers(fields, where, read_text(fields, where, "context")) for fields, where in records]
        return () if all(golds) else (NO_ANSWER,)

    def example(self, record: Mapping[str, Any], where: str, labelled: bool) -> QuestionExample:
        question, context = read_text(record, where, "question"), read_text(record, where, "context")
        answers = read_answers(record, where, context) if labelled else None
        top_k = 1 if record.get("top_k") is None else read_integer(record, where, "top_k", 1, CANDIDATES)
        return QuestionExample(where, question, context, answers, top_k)

    def encode(self, example: QuestionExample, tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
        spec = self.spec
        windows = encode_windows(tokenizer, example.question, example.context, spec.max_length, spec.stride)
        if spec.token_types:
            return windows
        return [replace(window, types=(0,) * len(window)) for window in windows]

    def target(self, example: QuestionExample, encodings: Sequence[Encoding]) -> tuple[tuple[int, int], ...]:
        """(start, end) row of the first gold answer in each window; (0, 0), [CLS], where it is not whole inside."""
        if not example.answers:
            return ((0, 0),) * len(encodings)
        return tuple(rows_of(encoding, example.answers[0]) for encoding in encodings)

    def weight(self, targets: Sequence[Any]) -> int:
        """The number of windows."""
        return sum(map(len, targets))

    def loss(self, out: Tensor, lengths: Sequence[int], targets: Sequence[Any]) -> Tensor:
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

    def metrics(self, answers: Sequence[Answer], examples: Sequence[QuestionExample]) -> dict[str, float]:
        """Normalised F1 and exact match of SQuAD, the best over gold answers."""
        golds = [[example.context[start:end] for start, end in example.answers or ()] for example in examples]
        return squad_scores(golds, [answer["answer"]["text"] for answer in answers])
