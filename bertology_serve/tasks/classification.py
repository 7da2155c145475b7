"""Classification of one text or a pair: softmax over C labels."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.tasks import metrics
from bertology_serve.tasks.base import Answer, G, Named, T, TextExample, TextTask
from bertology_serve.tasks.fields import Record, Records, known_label, read_class, sorted_labels
from bertology_serve.tasks.metrics import Floats, of_one
from bertology_serve.tasks.spec import CLASSIFICATION, Encoding, TaskSpec


@dataclass(frozen=True)
class ClassificationExample(TextExample):
    """``label`` is the gold class, None where nothing is known; ``shares`` those of several, where they differ."""

    label: str | None = None
    shares: Mapping[str, float] = field(default_factory=dict)


Weights = tuple[float, ...]
Target = int | Weights


class LabelTask(TextTask[T, G]):
    """A task whose answer is among labels, each with a probability: the head's outputs are C logits."""

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.index = {label: index for index, label in enumerate(spec.labels)}

    def temperature(self, logits: Tensor, targets: Sequence[G]) -> float:
        """The T > 0 that the loss of logits [n, C] / T likes best (Guo et al. 2017, arXiv 1706.04599).

        Under a prior log T ~ N(0, 1), which weighs as much as a row or two: a few rows that are all right do not make
        the scores certain.
        """
        low, high = -4.0, 4.0
        best = 0.0
        for _ in range(6):
            grid = np.linspace(low, high, 17)
            costs = [float(self.loss(logits * math.exp(-t), [], targets)) + t * t / 2 for t in grid]
            best, step = float(grid[int(np.argmin(costs))]), grid[1] - grid[0]
            low, high = best - step, best + step
        return math.exp(best)

    def tempered_loss(self, logits: Tensor, targets: Sequence[G]) -> float:
        """The sum of the losses of logits [n, C] once they are calibrated: what they know, however sure they are."""
        return float(self.loss(logits / self.temperature(logits, targets), [], targets))

    @abstractmethod
    def rows(self, targets: Sequence[G]) -> Tensor:
        """Targets as float64 [n, C], the weight of each class; multi-label [n, 2 C], of having and of lacking it."""

    @abstractmethod
    def shaped(self, targets: Sequence[G], balance: bool, smoothing: float) -> list[Weights]:
        """Training targets, smoothed (Szegedy et al. 2016, arXiv 1512.00567); ``balance``: labels weigh alike."""

    @abstractmethod
    def quick(self, out: Tensor, rows: Tensor) -> float:
        """The main metric of out [n, C] against the ``rows`` of the targets, without thresholds."""

    @abstractmethod
    def probabilities(self, out: Tensor) -> Tensor:
        """out [..., C] -> float64 [..., C]."""

    @abstractmethod
    def certainty(self, answers: Sequence[Answer], examples: Sequence[T]) -> Floats:
        """[M, 2]: the probabilities that answers give, and whether each came true; of what is known alone."""


class Classification(LabelTask[ClassificationExample, Target]):
    """Records ``{"text", "text_pair"?, "label"}``; answers ``label``, its ``score``, and ``scores`` of all labels.

    ``label`` may be an object with the share of each label: votes or probabilities, which the loss then learns. Below
    the spec's ``abstain`` the answer's label is None, and its scores say why. A target is the class's index, or a
    weight for each class (soft labels, class weights, smoothing).
    """

    kind = CLASSIFICATION
    main_metric = "accuracy"

    @classmethod
    def labels_in(cls, records: Records) -> tuple[str, ...]:
        classes = (read_class(fields, where) for fields, where in records)
        return sorted_labels({name for label, shares in classes for name in (label, *shares)})

    def example(self, record: Record, where: str, labelled: bool) -> ClassificationExample:
        label, shares = read_class(record, where) if labelled else (None, {})
        shares = {known_label(name, self.index, where, "label"): share for name, share in shares.items()}
        label = known_label(label, self.index, where, "label") if label else None
        return ClassificationExample(where, *self.texts(record, where), label, shares)

    def target(self, example: ClassificationExample, encodings: Sequence[Encoding]) -> Target:
        if example.shares:
            return tuple(example.shares.get(label, 0.0) for label in self.spec.labels)
        return self.index[str(example.label)]

    def rows(self, targets: Sequence[Target]) -> Tensor:
        found = torch.zeros(len(targets), len(self.spec.labels), dtype=torch.float64)
        for row, target in zip(found, targets, strict=True):
            if isinstance(target, int):
                row[target] = 1.0
            else:
                row.copy_(torch.tensor(target))
        return found

    def quick(self, out: Tensor, rows: Tensor) -> float:
        return (out.argmax(1) == rows.argmax(1)).double().mean().item()

    def shaped(self, targets: Sequence[Target], balance: bool, smoothing: float) -> list[Weights]:
        """``balance`` weighs an example by n / (C · n of its class), as scikit-learn's ``balanced`` does."""
        rows = self.rows(targets)
        each = rows.sum(0)
        weights = len(rows) / (rows.shape[1] * each.clamp_min(1.0)) if balance else torch.ones_like(each)
        soft = (1.0 - smoothing) * rows + smoothing / rows.shape[1]
        return [tuple(row) for row in (soft * (rows @ weights)[:, None]).tolist()]

    def loss(self, out: Tensor, lengths: Sequence[int], targets: Sequence[Target]) -> Tensor:
        """Cross-entropy of out [S, C]."""
        if all(isinstance(target, int) for target in targets):
            return F.cross_entropy(out.float(), torch.tensor(targets, device=out.device), reduction="sum")
        return F.cross_entropy(out.float(), self.rows(targets).to(out.device, torch.float32), reduction="sum")

    def prior(self, targets: Sequence[Target]) -> Tensor:
        """The log share [C] of each label."""
        return self.rows(targets).mean(0).log()

    def probabilities(self, out: Tensor) -> Tensor:
        return out.double().softmax(-1)

    def decode(
        self, example: ClassificationExample, encodings: Sequence[Encoding], outputs: Sequence[Tensor]
    ) -> Answer:
        scores = dict(zip(self.spec.labels, self.probabilities(outputs[0]).tolist(), strict=True))
        label = max(scores, key=scores.__getitem__)
        return {
            "label": label if scores[label] >= self.spec.abstain else None,
            "score": scores[label],
            "scores": scores,
        }

    def metrics(self, answers: Sequence[Answer], examples: Sequence[ClassificationExample]) -> dict[str, float]:
        """Accuracy, macro F1 and Matthews correlation of the best label; where some named none, the share that did
        (``coverage``) and the accuracy of those.
        """
        gold, found = [str(example.label) for example in examples], self.best(answers)
        measured = {
            "accuracy": metrics.accuracy(gold, found),
            "macro_f1": metrics.macro_f1(gold, found),
            "mcc": metrics.mcc(gold, found),
        }
        named = [row for row, answer in enumerate(answers) if answer["label"] is not None]
        if len(named) < len(answers):
            measured["coverage"] = len(named) / len(answers)
            measured["accuracy_covered"] = metrics.accuracy([gold[row] for row in named], [found[row] for row in named])
        return measured

    def best(self, answers: Sequence[Answer]) -> list[str]:
        """The best label of each answer, also of those that name none."""
        return [answer["label"] or max(answer["scores"], key=answer["scores"].__getitem__) for answer in answers]

    def parts(self, answers: Sequence[Answer], examples: Sequence[ClassificationExample]) -> Floats:
        right = [example.label == found for example, found in zip(examples, self.best(answers), strict=True)]
        return of_one(right)

    def quality(self, answers: Sequence[Answer], examples: Sequence[ClassificationExample]) -> Floats:
        """1 where it is right, else the less the surer it was."""
        right = self.parts(answers, examples)[:, 0] > 0
        return np.where(right, 1.0, 1.0 - np.array([answer["score"] for answer in answers]))

    def named(
        self, answers: Sequence[Answer], examples: Sequence[ClassificationExample]
    ) -> list[tuple[set[Named], set[Named]]]:
        pairs = zip(examples, self.best(answers), strict=True)
        return [({(str(example.label), 0, 0)}, {(found, 0, 0)}) for example, found in pairs]

    def certainty(self, answers: Sequence[Answer], examples: Sequence[ClassificationExample]) -> Floats:
        right = self.parts(answers, examples)[:, 0]
        return np.stack([np.array([answer["score"] for answer in answers]), right], 1)
