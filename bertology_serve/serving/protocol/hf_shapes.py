"""One answer of each task in the shape that HuggingFace's clients parse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bertology_serve.encoder.pipeline import Prediction
from bertology_serve.errors import DataError
from bertology_serve.serving.protocol.hf_options import Options
from bertology_serve.tasks.spec import (
    CLASSIFICATION,
    EMBEDDING,
    MULTIPLE_CHOICE,
    QUESTION_ANSWERING,
    REGRESSION,
    TOKEN_CLASSIFICATION,
)


@dataclass(frozen=True)
class Shape:
    """``answer`` makes one item's answer; ``nested``: a single text, too, is answered with a list of answers."""

    answer: Callable[[Prediction, Options], Any]
    nested: bool = False


def classification(prediction: Prediction, options: Options) -> list[dict[str, Any]]:
    """``[{label, score}]``, best first."""
    scores: dict[str, float] = prediction.answer["scores"]
    if options.needs_logits:
        scores = dict(zip(scores, prediction.answer["logits"], strict=True))
    if options.transform == "sigmoid":
        scores = {label: sigmoid(logit) for label, logit in scores.items()}
    ranked = sorted(scores.items(), key=lambda item: -item[1])
    return [{"label": label, "score": score} for label, score in ranked[: options.top_k]]


def regression(prediction: Prediction, options: Options) -> list[dict[str, Any]]:
    """``[{label: "value", score}]``, as a classification with one label."""
    return [{"label": "value", "score": prediction.answer["value"]}]


def tokens(prediction: Prediction, options: Options) -> list[dict[str, Any]]:
    """``[{entity_group, score, word, start, end}]``."""
    return [
        {
            "entity_group": entity["label"],
            "score": entity["score"],
            "word": entity["text"],
            "start": entity["start"],
            "end": entity["end"],
        }
        for entity in prediction.answer["entities"]
        if entity["label"] not in options.ignore_labels
    ]


def question(prediction: Prediction, options: Options) -> Any:
    """``{answer, score, start, end}``, or a list of them when more than one was asked for."""
    found = prediction.answer.get("answers", [prediction.answer["answer"]])
    answers = [
        {"answer": answer["text"], "score": answer["score"], "start": answer["start"], "end": answer["end"]}
        for answer in found
    ]
    return answers if (options.top_k or 1) > 1 else answers[0]


def embedding(prediction: Prediction, options: Options) -> list[float]:
    """The vector; the first ``dimensions`` of it, scaled again to unit length where it had that."""
    vector: Sequence[float] = prediction.answer["embedding"]
    if options.dimensions is not None and options.dimensions > len(vector):
        raise DataError(f"option 'dimensions' is {options.dimensions}; the embedding has {len(vector)}")
    part = list(vector[: options.dimensions])
    if not options.normalize or (options.unit and options.dimensions is None):
        return part
    size = math.sqrt(sum(number * number for number in part))
    return [number / size for number in part] if size else part


def own(prediction: Prediction, options: Options) -> dict[str, Any]:
    """This project's own shape."""
    return prediction.as_dict()


SHAPES = {
    CLASSIFICATION: Shape(classification, nested=True),
    REGRESSION: Shape(regression, nested=True),
    TOKEN_CLASSIFICATION: Shape(tokens),
    QUESTION_ANSWERING: Shape(question),
    EMBEDDING: Shape(embedding),
    MULTIPLE_CHOICE: Shape(own),
}


def sigmoid(logit: float) -> float:
    """1 / (1 + exp(-logit)) that does not overflow."""
    return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1.0 + math.exp(logit))
