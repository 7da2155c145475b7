"""Classification of one text or a pair: softmax over C labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.tasks import metrics
from bertology_serve.tasks.base import Answer, TextExample, TextTask
from bertology_serve.tasks.fields import label_index, read_class, sorted_labels
from bertology_serve.tasks.spec import CLASSIFICATION, Encoding, TaskSpec


@dataclass(frozen=True)
class ClassificationExample(TextExample):
    """``label`` is the gold class, None where nothing is known."""

    label: str | None = None


class Classification(TextTask[ClassificationExample]):
    """Records ``{"text", "text_pair"?, "label"}``; answers ``label``, its ``score``, and ``scores`` of all labels."""

    kind = CLASSIFICATION
    main_metric = "accuracy"

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.index = {label: index for index, label in enumerate(spec.labels)}

    @classmethod
    def labels_in(cls, records: Iterable[tuple[Mapping[str, Any], str]]) -> tuple[str, ...]:
        return sorted_labels({read_class(fields, where) for fields, where in records})

    def example(self, record: Mapping[str, Any], where: str, labelled: bool) -> ClassificationExample:
        label = None
        if labelled:
            label = read_class(record, where)
            label_index(label, self.index, where, "label")
        return ClassificationExample(where, *self.texts(record, where), label)

    def target(self, example: ClassificationExample, encodings: Sequence[Encoding]) -> int:
        return label_index(str(example.label), self.index, example.where, "label")

    def loss(self, out: Tensor, lengths: Sequence[int], targets: Sequence[Any]) -> Tensor:
        """Cross-entropy of out [S, C]."""
        gold = torch.tensor(targets, device=out.device)
        return F.cross_entropy(out.float(), gold, reduction="sum")

    def prior(self, targets: Sequence[Any]) -> Tensor:
        """The log share [C] of each label."""
        return torch.bincount(torch.tensor(targets), minlength=len(self.spec.labels)).double().div(len(targets)).log()

    def decode(
        self, example: ClassificationExample, encodings: Sequence[Encoding], outputs: Sequence[Tensor]
    ) -> Answer:
        scores = dict(zip(self.spec.labels, outputs[0].double().softmax(0).tolist(), strict=True))
        label = max(scores, key=scores.__getitem__)
        return {"label": label, "score": scores[label], "scores": scores}

    def metrics(self, answers: Sequence[Answer], examples: Sequence[ClassificationExample]) -> dict[str, float]:
        """Accuracy, macro F1 and Matthews correlation."""
        gold = [str(example.label) for example in examples]
        found = [answer["label"] for answer in answers]
        return {
            "accuracy": metrics.accuracy(gold, found),
            "macro_f1": metrics.macro_f1(gold, found),
            "mcc": metrics.mcc(gold, found),
        }
