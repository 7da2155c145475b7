"""Multiple choice: each choice is one sequence beside the prompt, a softmax over the choices' scores decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertology_serve.errors import DataError
from bertology_serve.tasks import metrics
from bertology_serve.tasks.base import Answer, Example, Task
from bertology_serve.tasks.encoding import encode_long
from bertology_serve.tasks.fields import Record, optional_text, read_integer, read_texts
from bertology_serve.tasks.metrics import Floats, of_one
from bertology_serve.tasks.spec import MULTIPLE_CHOICE, Encoding

MOST_CHOICES = 64
COPA_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


@dataclass(frozen=True)
class ChoiceExample(Example):
    """``prompt`` is what the choices answer, ``label`` the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    label: int | None = None


class MultipleChoice(Task[ChoiceExample, tuple[int, int]]):
    """Records ``{"premise" or "question" (or both), "choices", "label"}``; answers ``choice``, ``score``, ``scores``.

    With both, the prompt is the premise, a space, and the question; COPA's questions "cause" and "effect" are
    written out. ``label`` and ``choice`` count from 0.
    """

    kind = MULTIPLE_CHOICE
    main_metric = "accuracy"

    def example(self, record: Record, where: str, labelled: bool) -> ChoiceExample:
        choices = read_texts(record, where, "choices", 2, MOST_CHOICES)
        label = read_integer(record, where, "label", 0, len(choices) - 1) if labelled else None
        return ChoiceExample(where, _prompt(record, where), choices, label)

    def encode(self, example: ChoiceExample, tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
        return [one for choice in example.choices for one in encode_long(tokenizer, example.prompt, choice, self.spec)]

    def target(self, example: ChoiceExample, encodings: Sequence[Encoding]) -> tuple[int, int]:
        """The right choice and the number of choices."""
        return int(example.label or 0), len(example.choices)

    def loss(self, out: Tensor, lengths: Sequence[int], targets: Sequence[tuple[int, int]]) -> Tensor:
        """Cross-entropy over each example's choices; out is [S, 1], all choices of all examples in order."""
        scores = torch.split(out.float().squeeze(1), [count for _, count in targets])
        terms = [-row.log_softmax(0)[right] for row, (right, _) in zip(scores, targets, strict=True)]
        return torch.stack(terms).sum()

    def decode(self, example: ChoiceExample, encodings: Sequence[Encoding], outputs: Sequence[Tensor]) -> Answer:
        scores = torch.cat(list(outputs)).double().softmax(0).tolist()
        choice = max(range(len(scores)), key=scores.__getitem__)
        return {"choice": choice, "score": scores[choice], "scores": scores}

    def metrics(self, answers: Sequence[Answer], examples: Sequence[ChoiceExample]) -> dict[str, float]:
        gold = [str(example.label) for example in examples]
        return {"accuracy": metrics.accuracy(gold, [str(answer["choice"]) for answer in answers])}

    def parts(self, answers: Sequence[Answer], examples: Sequence[ChoiceExample]) -> Floats:
        right = (example.label == answer["choice"] for example, answer in zip(examples, answers, strict=True))
        return of_one([float(one) for one in right])


def _prompt(record: Record, where: str) -> str:
    premise = optional_text(record, where, "premise")
    question = optional_text(record, where, "question")
    if premise is None and question is None:
        raise DataError(f"{where}: fields 'premise' and 'question' are missing; expected at least one of them")
    if premise is not None and question is not None:
        return f"{premise} {COPA_QUESTIONS.get(question, question)}"
    return premise or question or ""
