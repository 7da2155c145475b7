from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bertology_serve.encoder.pipeline import Request
from bertology_serve.errors import DataError, LimitError, NotFound, Overloaded
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.engine import ClientGone, Engine
from bertology_serve.serving.metrics import Metrics
from tests.serving.conftest import RECORDS
from tests.serving.held import Held


def with_engine(pipeline: Any, use: Callable[[Engine], Awaitable[Any]], **options: Any) -> tuple[Any, str]:
    """What ``use(engine)`` gives, and the metrics at the end."""
    metrics = Metrics()

    async def run() -> Any:
        engine = Engine(pipeline, ServerConfig(**options), metrics)
        engine.start()
        try:
            return await use(engine)
        finally:
            assert await engine.stop()

    return asyncio.run(run()), metrics.render().decode()


def text(words: str) -> Request:
    return Request("mood", {"text": words})


def test_many_calls_share_batches_and_get_their_own_answers(pipeline):
    requests = [Request(name, record) for name, record in RECORDS.items()] * 3
    alone = [pipeline.run([pipeline.prepare(request)])[0].as_dict() for request in requests]

    async def use(engine: Engine) -> Any:
        return await asyncio.gather(*(engine.answer([request]) for request in requests))

    answers, metrics = with_engine(pipeline, use)
    for (answer,), expected in zip(answers, alone, strict=True):
        own = answer.as_dict()
        assert own.keys() == expected.keys()
        assert (own["delta"], own["version"], own["task"]) == (expected["delta"], expected["version"], expected["task"])
        if "scores" in own and own["task"] == "classification":
            assert own["scores"] == pytest.approx(expected["scores"], abs=1e-5)
    assert 'bertology_items_total{delta="mood",outcome="answered"} 3.0' in metrics
    assert "bertology_batch_deltas_sum" in metrics


def test_the_first_bad_item_is_what_a_call_hears_of(pipeline):
    async def use(engine: Engine) -> Any:
        with pytest.raises(DataError, match="row 7: field 'text' is empty"):
            await engine.answer([text("a cat"), Request("mood", {"text": ""}, where="row 7")])
        with pytest.raises(NotFound, match="no delta 'moot'"):
            await engine.answer([Request("moot", {"text": "a"})])
        with pytest.raises(DataError, match="no items"):
            await engine.answer([])

    with_engine(pipeline, use)


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        ({"max_items": 2}, 3, "holds 3 items; at most 2"),
        ({"max_text_characters": 5}, 1, "field 'text' holds 16 characters; at most 5"),
        ({"max_item_tokens": 4}, 1, "6 tokens, all windows or choices together; at most 4"),
        ({"max_item_tokens": 10, "max_queue_tokens": 20}, 4, "the call holds 24 tokens; at most 20"),
    ],
)
def test_limits(pipeline, options, count, message):
    async def use(engine: Engine) -> Any:
        with pytest.raises(LimitError, match=message):
            await engine.answer([text("the cat was good")] * count)

    with_engine(pipeline, use, **options)


def test_long_texts_are_tokenised_beside_the_event_loop(pipeline, monkeypatch):
    threads: set[str] = set()
    prepare = pipeline.prepare
    monkeypatch.setattr(
        pipeline, "prepare", lambda request: threads.add(threading.current_thread().name) or prepare(request)
    )

    async def use(engine: Engine) -> Any:
        return await engine.answer([text("cat " * 5000)])

    answers, _ = with_engine(pipeline, use)
    assert len(answers) == 1
    assert all(name.startswith("tokenizer") for name in threads)


def test_a_full_queue_refuses_at_once(pipeline):
    held = Held(pipeline)

    async def use(engine: Engine) -> Any:
        first = asyncio.ensure_future(engine.answer([text("the cat")]))
        await asyncio.to_thread(held.busy.wait, 20)
        queued = asyncio.ensure_future(engine.answer([text("the dog")] * 2))
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await engine.answer([text("the house")])
        held.go.set()
        return [len(await first), len(await queued)]

    answers, metrics = with_engine(held, use, max_queue_tokens=8, max_item_tokens=8)
    assert answers == [1, 2]
    assert 'outcome="refused"} 1.0' in metrics


def test_who_has_left_costs_no_compute(pipeline):
    held = Held(pipeline)

    async def use(engine: Engine) -> Any:
        first = asyncio.ensure_future(engine.answer([text("the cat")]))
        await asyncio.to_thread(held.busy.wait, 20)

        async def gone() -> None:
            await asyncio.sleep(0.01)

        with pytest.raises(ClientGone):
            await engine.answer([text("the dog")], gone)
        cancelled = asyncio.ensure_future(engine.answer([text("the house")]))
        await asyncio.sleep(0.01)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert engine.queue.tokens == 0
        held.go.set()
        await first

    _, metrics = with_engine(held, use)
    assert held.batches == [["the cat"]]
    assert 'bertology_items_total{delta="mood",outcome="dropped"} 2.0' in metrics


def test_a_failing_batch_hurts_only_its_own_call(pipeline, monkeypatch):
    run = pipeline.run

    def failing(jobs: Any) -> Any:
        if any("bad" in job.request.record["text"] for job in jobs):
            raise ValueError("a fault")
        return run(jobs)

    monkeypatch.setattr(pipeline, "run", failing)

    async def use(engine: Engine) -> Any:
        good = [asyncio.ensure_future(engine.answer([text("the cat")])) for _ in range(3)]
        with pytest.raises(ValueError, match="a fault"):
            await engine.answer([text("bad")])
        return await asyncio.gather(*good)

    answers, metrics = with_engine(pipeline, use)
    assert [len(answer) for answer in answers] == [1, 1, 1]
    assert 'bertology_items_total{delta="mood",outcome="failed"} 1.0' in metrics


def test_stopping_answers_what_was_accepted_and_refuses_the_rest(pipeline):
    held = Held(pipeline)

    async def use(engine: Engine) -> Any:
        accepted = [asyncio.ensure_future(engine.answer([text("the cat")])) for _ in range(5)]
        await asyncio.to_thread(held.busy.wait, 20)
        engine.drain()
        assert not engine.ready
        late = asyncio.ensure_future(engine.answer([text("the dog")]))  # draining, not stopped: still taken
        await asyncio.sleep(0.01)
        stopping = asyncio.ensure_future(engine.stop())
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded, match="stopping"):
            await engine.answer([text("the house")])
        held.go.set()
        assert await stopping
        return await asyncio.gather(*accepted, late)

    answers, _ = with_engine(held, use)
    assert len(answers) == 6


def test_warm_up_answers_before_the_engine_starts(pipeline):
    Engine(pipeline, ServerConfig(), Metrics()).warm_up()


def test_answers_after_the_loop_has_closed_are_logged_not_raised(pipeline, caplog):
    engine = Engine(pipeline, ServerConfig(), Metrics())

    async def start() -> None:
        engine.start()

    asyncio.run(start())
    engine._deliver([object()], [ValueError()])
    assert "1 answers came after the server had stopped" in caplog.text
    asyncio.run(engine.stop())
