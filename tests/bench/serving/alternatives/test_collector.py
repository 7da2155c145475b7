from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from bertology_serve.bench.serving.alternatives.collector import MOST, Collector


class Model:
    """Answers each text with itself; the first batch waits for ``go``."""

    def __init__(self) -> None:
        self.go, self.batches = threading.Event(), list[list[str]]()

    def __call__(self, names: Any, texts: Any) -> Any:
        assert self.go.wait(20)
        self.batches.append(list(texts))
        if "bad" in texts:
            raise ValueError("a bad text")
        return [{"text": text} for text in texts]


async def asked(model: Model, mixed: bool, calls: list[tuple[str, str]]) -> list[Any]:
    collector = Collector(model, mixed)
    running = asyncio.create_task(collector.run())
    waiting = []
    for call in calls:
        waiting.append(asyncio.create_task(collector.ask(*call)))
        await asyncio.sleep(0.01)
    model.go.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    running.cancel()
    return answers


def test_what_waits_for_the_same_model_is_answered_together():
    calls = [("a", "1"), ("a", "2"), ("b", "3"), ("a", "4"), ("b", "5")]
    apart, together = Model(), Model()
    for model, mixed in ((apart, False), (together, True)):
        answers = asyncio.run(asked(model, mixed, calls))
        assert [one["text"] for one in answers] == ["1", "2", "3", "4", "5"]
    assert apart.batches == [["1"], ["2", "4"], ["3", "5"]]
    assert together.batches == [["1"], ["2", "3", "4", "5"]]


def test_batches_have_an_end_and_a_fault_reaches_who_waits_for_it():
    model = Model()
    answers = asyncio.run(asked(model, True, [("a", "bad")] + [("a", "good")] * (MOST + 1)))
    assert [len(batch) for batch in model.batches] == [1, MOST, 1]
    with pytest.raises(ValueError, match="a bad text"):
        raise answers[0]
    assert answers[1:] == [{"text": "good"}] * (MOST + 1)
