"""Deltas of every kind and task, requests for them, and what this package answers to the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.export.emitter.mixed import EVERY

RANKS = [Lora(rank=2)]
LABELS = ("bad", "good", "none")
# what is decoded in its own way, beside the kinds and tasks of every export
DECODED: dict[str, tuple[list[Any], TaskSpec]] = {
    "unsure": (RANKS, TaskSpec("classification", LABELS, max_length=24, abstain=0.9)),
    "pairs": (RANKS, TaskSpec("classification", LABELS, max_length=16, pairs=True)),
    "windows": ([Bitfit()], TaskSpec("classification", LABELS, max_length=12, long="windows", stride=4)),
    "largest": (RANKS, TaskSpec("multi-label", LABELS, max_length=12, long="windows", stride=3, aggregate="max")),
    "tags": (
        RANKS,
        TaskSpec("token-classification", ("O", "S-A", "B-A", "E-A", "NOUN"), max_length=12, long="windows", stride=6),
    ),
    "none": (RANKS, TaskSpec("question-answering", ("no-answer",), max_length=20, stride=6, max_answer_length=4)),
    "untyped": (RANKS, TaskSpec("question-answering", max_length=20, stride=6, token_types=False)),
    "prompted": (
        RANKS,
        TaskSpec("embedding", max_length=16, head="none", pooling="mean", prompts=(("query", "find "), ("", "the "))),
    ),
    "raw": (RANKS, TaskSpec("embedding", max_length=12, head="none", normalize=False, long="windows", stride=4)),
    "scrolls": (
        RANKS,
        TaskSpec("zero-shot", ("x", "y"), max_length=12, head="none", pooling="mean", long="windows", stride=4),
    ),
    "words": (
        RANKS,
        TaskSpec(
            "zero-shot",
            ("card_arrival", "x"),
            max_length=32,
            head="none",
            pooling="mean",
            label_texts=("", "a red cat"),
        ),
    ),
}
TEXTS = [
    "The cat was very good.",
    "Ada met the dog in Paris , early",
    "bad money " * 20 + "in London?",
    "  Zürich's naïve café — ΟΔΟΣ 東京 \U0001f600 e\u0301te\u0301 don't  (a.b.) 1,234.5 @ada x_y http://a.b/c, U.S.A. ",
]
OWN: dict[str, list[dict[str, Any]]] = {
    "token-classification": [{"tokens": ["Ada", "met", "\U0001f600dog", "in", "Paris"]}]
    + [{"text": text, "offsets": "utf16"} for text in TEXTS],
    "question-answering": [
        {"question": "who met the dog ?", "context": text, "top_k": count, "offsets": "utf16"}
        for count, text in enumerate(TEXTS, 1)
    ],
    "multiple-choice": [
        {"premise": "the film was bad", "question": "cause", "choices": ["money", "a dog", "it was late " * 20]},
        {"question": "what is good", "choices": ["the river", "the bank"]},
    ],
    "embedding": [{"text": TEXTS[1], "text_pair": TEXTS[0]}, {"text": TEXTS[2], "dimensions": 5}],
    "zero-shot": [
        {"text": TEXTS[0]},
        {"text": TEXTS[1], "labels": ["good dog", "PlayMusic"], "multi_label": True},
        {"text": TEXTS[2], "text_pair": TEXTS[1]},
    ],
}
PROMPTS = [{"text": TEXTS[0], **one} for one in ({"input_type": "search_query"}, {"prompt_name": "query"}, {})]


def deltas(encoder: Encoder, size: float = 0.1) -> list[Delta]:
    every = EVERY | DECODED
    return [tiny.delta(encoder, name, *every[name], seed=seed, size=size) for seed, name in enumerate(every)]


def requests(made: list[Delta]) -> Iterator[dict[str, Any]]:
    """For each delta in turn requests of every form that its task takes, so that neighbours are of other deltas."""
    for round in range(max(map(len, OWN.values())) + len(TEXTS)):
        for delta in made:
            pairs = [{"text": text, "text_pair": TEXTS[2]} for text in TEXTS[:2]]
            plain = [] if delta.task.pairs else [{"text": text} for text in TEXTS]
            records = OWN.get(delta.task.kind, pairs + plain) + PROMPTS * (delta.name == "prompted")
            if round < len(records):
                yield {"delta": delta.name, **records[round]}


def answers(encoder: Encoder, made: list[Delta], asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the server's own path answers."""
    pipeline = Pipeline(encoder, made)
    records = [{name: value for name, value in one.items() if name != "delta"} for one in asked]
    found = pipeline.answer(Request(one["delta"], record) for one, record in zip(asked, records, strict=True))
    return [prediction.as_dict() for prediction in found]


def furthest(found: Any, expected: Any, where: str = "") -> float:
    """The largest difference of two answers' numbers; AssertionError where anything else differs."""
    if isinstance(expected, float) or isinstance(found, float):
        return abs(found - expected) if math.isfinite(expected) else math.inf
    if isinstance(expected, dict):
        assert list(found) == list(expected) or sorted(found) == sorted(expected), f"{where}: {found} != {expected}"
        return max((furthest(found[name], expected[name], f"{where}.{name}") for name in expected), default=0.0)
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected), f"{where}: {found} != {expected}"
        return max((furthest(*both, where) for both in zip(found, expected, strict=True)), default=0.0)
    assert found == expected, f"{where}: {found!r} != {expected!r}"
    return 0.0
