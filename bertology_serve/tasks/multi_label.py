"""Multi-label classification of one text or a pair: a sigmoid for each of C labels, of which any number may apply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.tasks import metrics
from bertology_serve.tasks.base import Answer, Named, TextExample
from bertology_serve.tasks.classification import LabelTask, Weights
from bertology_serve.tasks.fields import Record, Records, label_names, read_labels, sorted_labels
from bertology_serve.tasks.metrics import Flags, Floats
from bertology_serve.tasks.spec import EVEN, IGNORED, MULTI_LABEL, Encoding, TaskSpec


@dataclass(frozen=True)
class MultiLabelExample(TextExample):
    """``labels`` says 1 of those that apply (or how much they do), -100 where it is not known; others do not."""

    labels: Mapping[str, float] = field(default_factory=dict)


class MultiLabel(LabelTask[MultiLabelExample, Weights]):
    """Records ``{"text", "text_pair"?, "label"}``, ``label`` as ``read_labels`` has it; answers ``labels``, those whose
    probability reaches their threshold, and the ``scores`` of all.

    A target is the weight of the positive case for each label, then that of the negative: both 0 where a label (-100)
    is not known, which then teaches nothing and is left out of the metrics.
    """

    kind = MULTI_LABEL
    main_metric = "micro_f1"

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.thresholds = spec.thresholds or (EVEN,) * len(spec.labels)

    @classmethod
    def labels_in(cls, records: Records) -> tuple[str, ...]:
        return sorted_labels(label_names(records))

    def example(self, record: Record, where: str, labelled: bool) -> MultiLabelExample:
        labels = read_labels(record, where, self.index) if labelled else {}
        return MultiLabelExample(where, *self.texts(record, where), labels)

    def target(self, example: MultiLabelExample, encodings: Sequence[Encoding]) -> Weights:
        shares = [example.labels.get(label, 0.0) for label in self.spec.labels]
        known = [(share, 1.0 - share) if share != IGNORED else (0.0, 0.0) for share in shares]
        return tuple(share for side in zip(*known, strict=True) for share in side)

    def rows(self, targets: Sequence[Weights]) -> Tensor:
        return torch.tensor(targets, dtype=torch.float64)

    def quick(self, out: Tensor, rows: Tensor) -> float:
        has, lacks = rows.chunk(2, 1)
        gold, found = has > lacks, (out >= 0) & (has + lacks > 0)
        return metrics.ratio(2 * int((gold & found).sum()), int(gold.sum() + found.sum()))

    def shaped(self, targets: Sequence[Weights], balance: bool, smoothing: float) -> list[Weights]:
        rows = self.rows(targets).view(len(targets), 2, -1)
        both = rows.sum(1, keepdim=True)
        soft = (1.0 - smoothing) * rows + smoothing / 2 * both
        if balance:
            soft = soft * both.sum(0) / (2.0 * rows.sum(0).clamp_min(1.0))
        return [tuple(row) for row in soft.flatten(1).tolist()]

    def loss(self, out: Tensor, lengths: Sequence[int], targets: Sequence[Weights]) -> Tensor:
        """Binary cross-entropy of out [S, C], the mean over labels."""
        sides = torch.cat([out, -out], 1).float()
        return -(F.logsigmoid(sides) * self.rows(targets).to(out.device, torch.float32)).sum() / out.shape[1]

    def prior(self, targets: Sequence[Weights]) -> Tensor:
        """The log odds [C] of each label."""
        has, lacks = self.rows(targets).sum(0).chunk(2)
        return has.log() - lacks.log()

    def probabilities(self, out: Tensor) -> Tensor:
        return out.double().sigmoid()

    def decode(self, example: MultiLabelExample, encodings: Sequence[Encoding], outputs: Sequence[Tensor]) -> Answer:
        scores = dict(zip(self.spec.labels, self.probabilities(outputs[0]).tolist(), strict=True))
        above = zip(scores.items(), self.thresholds, strict=True)
        return {"labels": [label for (label, score), least in above if score >= least], "scores": scores}

    def metrics(self, answers: Sequence[Answer], examples: Sequence[MultiLabelExample]) -> dict[str, float]:
        """Micro, macro and sample F1, and the share of texts whose labels are all right; of labels and of texts that
        something is known of.
        """
        gold, found = self.tables(answers, examples)
        known = self.shares(examples) != IGNORED
        labels, texts = known.any(0), known.any(1)
        return {
            "micro_f1": metrics.ratio(2 * (gold & found).sum(), gold.sum() + found.sum()),
            "macro_f1": metrics.mean(metrics.f1_of(gold, found, 0)[labels]),
            "samples_f1": metrics.mean(metrics.f1_of(gold, found, 1)[texts]),
            "exact": metrics.mean((gold == found).all(1)[texts]),
        }

    def shares(self, examples: Sequence[MultiLabelExample]) -> Floats:
        """[N, C]: how much each label applies, -100 where it is not known."""
        return np.array([[example.labels.get(label, 0.0) for label in self.spec.labels] for example in examples])

    def tables(self, answers: Sequence[Answer], examples: Sequence[MultiLabelExample]) -> tuple[Flags, Flags]:
        """[N, C] each: the labels that apply, and those named; neither where it is not known."""
        shares = self.shares(examples)
        named = [{*answer["labels"]} for answer in answers]
        found = np.array([[label in own for label in self.spec.labels] for own in named])
        return shares >= EVEN, found & (shares != IGNORED)

    def parts(self, answers: Sequence[Answer], examples: Sequence[MultiLabelExample]) -> Floats:
        gold, found = self.tables(answers, examples)
        return np.stack([2.0 * (gold & found).sum(1), gold.sum(1) + found.sum(1)], 1)

    def named(
        self, answers: Sequence[Answer], examples: Sequence[MultiLabelExample]
    ) -> list[tuple[set[Named], set[Named]]]:
        sides = [
            [{(label, 0, 0) for label, one in zip(self.spec.labels, row, strict=True) if one} for row in table]
            for table in self.tables(answers, examples)
        ]
        return list(zip(*sides, strict=True))

    def certainty(self, answers: Sequence[Answer], examples: Sequence[MultiLabelExample]) -> Floats:
        shares = self.shares(examples)
        scores = np.array([list(answer["scores"].values()) for answer in answers])
        known = shares != IGNORED
        return np.stack([scores[known], shares[known] >= EVEN], 1)
