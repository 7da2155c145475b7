"""Regression on one text or a pair: one number, mean squared error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.tasks import metrics
from bertology_serve.tasks.base import Answer, TextExample, TextTask
from bertology_serve.tasks.fields import Record, read_score
from bertology_serve.tasks.metrics import Bounds, Floats
from bertology_serve.tasks.spec import REGRESSION, Encoding


@dataclass(frozen=True)
class RegressionExample(TextExample):
    """``score`` is the gold value, None where nothing is known."""

    score: float | None = None


class Regression(TextTask[RegressionExample, float]):
    """Records ``{"text", "text_pair"?, "score"}`` (or ``label`` as a number); answers ``value``, in the same units."""

    kind = REGRESSION
    main_metric = "spearman"

    def example(self, record: Record, where: str, labelled: bool) -> RegressionExample:
        score = read_score(record, where) if labelled else None
        return RegressionExample(where, *self.texts(record, where), score)

    def target(self, example: RegressionExample, encodings: Sequence[Encoding]) -> float:
        return float(example.score or 0.0)

    def loss(self, out: Tensor, lengths: Sequence[int], targets: Sequence[float]) -> Tensor:
        """Squared errors of out [S, 1]."""
        gold = torch.tensor(targets, dtype=torch.float32, device=out.device)
        return F.mse_loss(out.float().squeeze(1), gold, reduction="sum")

    def prior(self, targets: Sequence[float]) -> Tensor:
        """The mean score [1]."""
        return torch.tensor(targets, dtype=torch.float64).mean().view(1)

    def decode(self, example: RegressionExample, encodings: Sequence[Encoding], outputs: Sequence[Tensor]) -> Answer:
        return {"value": float(outputs[0][0])}

    def metrics(self, answers: Sequence[Answer], examples: Sequence[RegressionExample]) -> dict[str, float]:
        """Spearman and Pearson correlation, and the mean squared error."""
        gold = [float(example.score or 0.0) for example in examples]
        found = [answer["value"] for answer in answers]
        return {
            "spearman": metrics.spearman(gold, found),
            "pearson": metrics.pearson(gold, found),
            "mse": metrics.mse(gold, found),
        }

    def parts(self, answers: Sequence[Answer], examples: Sequence[RegressionExample]) -> Floats:
        """[N, 2]: the gold score and the answer."""
        return np.array(
            [[float(example.score or 0.0), answer["value"]] for example, answer in zip(examples, answers, strict=True)]
        )

    def quality(self, answers: Sequence[Answer], examples: Sequence[RegressionExample]) -> Floats:
        """1 less the distance from the gold score."""
        gold, found = self.parts(answers, examples).T
        near: Floats = 1.0 - np.abs(gold - found)
        return near

    def main(self, parts: Floats) -> float:
        return metrics.spearman(*parts.T)

    def bounds(self, parts: Floats) -> Bounds:
        return metrics.CORRELATION
