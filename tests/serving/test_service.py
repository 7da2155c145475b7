from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bertology_serve.encoder.delta_set import RowCache
from bertology_serve.encoder.pipeline import Request
from bertology_serve.errors import DataError, Expired, LimitError, NotFound, Overloaded, RateLimited
from bertology_serve.serving import service as services
from bertology_serve.serving.batching.queue import BatchTimes
from bertology_serve.serving.batching.scheduler import CallContext
from bertology_serve.serving.batching.warmup import warm_up
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.observability.metrics import Metrics
from bertology_serve.serving.service import ClientGone, Service
from bertology_serve.serving.versions.delta_registry import Registry
from tests.serving.conftest import RECORDS
from tests.serving.held import Held
from tests.tiny import WORDS


def with_service(pipeline: Any, use: Callable[[Service], Awaitable[Any]], **options: Any) -> tuple[Any, str]:
    """What ``use(service)`` gives, and the metrics at the end."""
    metrics = Metrics()

    async def run() -> Any:
        service = Service(Registry(pipeline), ServerConfig.of(**options), metrics)
        service.start()
        try:
            return await use(service)
        finally:
            assert await service.stop()

    return asyncio.run(run()), metrics.render().decode()


def paying(charge: Callable[[int], None]) -> CallContext:
    access: Any = SimpleNamespace(charge=charge, restricted=False, metered=True, allows=lambda _: True)
    return CallContext(access)


def text(words: str) -> Request:
    return Request("mood", {"text": words})


def several(count: int) -> list[Request]:
    """Texts of 6 tokens, none of them twice."""
    return [text(" ".join(words)) for words in itertools.islice(itertools.permutations(WORDS, 4), count)]


def test_many_calls_share_batches_and_get_their_own_answers(pipeline):
    requests = [Request(name, record) for name, record in RECORDS.items()] * 3
    alone = [pipeline.run([pipeline.prepare(request)])[0].as_dict() for request in requests]

    async def use(service: Service) -> Any:
        return await asyncio.gather(*(service.answer(CallContext(), [request]) for request in requests))

    answers, metrics = with_service(pipeline, use)
    for (answer,), expected in zip(answers, alone, strict=True):
        own = answer.as_dict()
        assert own.keys() == expected.keys()
        assert (own["delta"], own["version"], own["task"]) == (expected["delta"], expected["version"], expected["task"])
        if "scores" in own and own["task"] == "classification":
            assert own["scores"] == pytest.approx(expected["scores"], abs=1e-5)
    assert 'bertology_items_total{delta="mood",outcome="answered"} 3.0' in metrics
    assert "bertology_batch_deltas_sum" in metrics


def test_the_first_bad_item_is_what_a_call_hears_of(pipeline):
    async def use(service: Service) -> Any:
        with pytest.raises(DataError, match="row 7: field 'text' is empty"):
            await service.answer(CallContext(), [text("a cat"), Request("mood", {"text": ""}, where="row 7")])
        with pytest.raises(NotFound, match="no delta 'moot'"):
            await service.answer(CallContext(), [Request("moot", {"text": "a"})])
        with pytest.raises(DataError, match="no items"):
            await service.answer(CallContext(), [])

    with_service(pipeline, use)


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        ({"max_items": 2}, 3, "holds 3 items; at most 2"),
        ({"max_text_characters": 5}, 1, "field 'text' holds 13 characters; at most 5"),
        ({"max_item_tokens": 4}, 1, "6 tokens, all windows or choices together; at most 4"),
        ({"max_item_tokens": 10, "max_queue_tokens": 20}, 4, "the call holds 24 tokens or more; at most 20"),
        (
            {"max_item_tokens": 10, "max_delta_tokens": 20},
            4,
            "the call holds 24 tokens for one delta or more; at most 20",
        ),
    ],
)
def test_limits(pipeline, options, count, message):
    async def use(service: Service) -> Any:
        with pytest.raises(LimitError, match=message):
            await service.answer(CallContext(), several(count))

    with_service(pipeline, use, **options)


def test_long_texts_are_tokenised_beside_the_event_loop(pipeline, monkeypatch):
    threads: set[str] = set()
    tokenise = pipeline.tokenise
    monkeypatch.setattr(pipeline, "tokenise", lambda job: threads.add(threading.current_thread().name) or tokenise(job))

    async def use(service: Service) -> Any:
        return await service.answer(CallContext(), [text("cat " * 5000)])

    answers, _ = with_service(pipeline, use)
    assert len(answers) == 1
    assert all(name.startswith("tokenizer") for name in threads)


def test_large_work_is_done_beside_the_event_loop_and_only_so_much_of_it(pipeline, monkeypatch):
    monkeypatch.setattr(services, "MOST_ASIDE", 3)
    go, seen = threading.Event(), list[str]()

    def work() -> str:
        assert go.wait(20)
        seen.append(threading.current_thread().name)
        return "done"

    async def use(service: Service) -> Any:
        assert await service.aside(10, lambda: threading.current_thread().name) == threading.current_thread().name
        large = [asyncio.ensure_future(service.aside(10**6, work)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="3 large calls are being read; try again in 1 s"):
            await service.aside(10**6, work)
        go.set()
        assert await asyncio.gather(*large) == ["done"] * 3
        assert await service.aside(10**6, work) == "done"

    with_service(pipeline, use)
    assert all(name.startswith("tokenizer") for name in seen)


def test_tokenising_ends_with_the_first_item_that_is_too_much(pipeline, monkeypatch):
    seen, tokenise = list[Any](), pipeline.tokenise
    monkeypatch.setattr(pipeline, "tokenise", lambda job: seen.append(1) or tokenise(job))

    async def use(service: Service) -> Any:
        with pytest.raises(LimitError, match="126 tokens or more; at most 120"):
            await service.answer(CallContext(), several(100))

    with_service(pipeline, use, max_item_tokens=10, max_queue_tokens=120)
    assert len(seen) == 21


def test_nobody_pays_for_a_refusal(pipeline):
    held, paid = Held(pipeline), list[int]()

    async def use(service: Service) -> Any:
        first = asyncio.ensure_future(service.answer(paying(paid.append), [text("the cat")]))
        while not held.busy.is_set():
            await asyncio.sleep(0.001)
        second = asyncio.ensure_future(service.answer(paying(paid.append), [text("the cat was"), text("was the cat")]))
        while not service.queue.items:
            await asyncio.sleep(0.001)
        with pytest.raises(Overloaded):
            await service.answer(paying(paid.append), [text("the cat was good and red")])
        assert paid == [4, 10]
        held.go.set()
        await asyncio.gather(first, second)

    with_service(held, use, max_queue_tokens=12, max_item_tokens=12)


def test_a_full_queue_refuses_at_once(pipeline):
    held = Held(pipeline)

    async def use(service: Service) -> Any:
        first = asyncio.ensure_future(service.answer(CallContext(), [text("the cat")]))
        await asyncio.to_thread(held.busy.wait, 20)
        queued = asyncio.ensure_future(service.answer(CallContext(), [text("the dog")] * 2))
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await service.answer(CallContext(), [text("the house")])
        held.go.set()
        return [len(await first), len(await queued)]

    answers, metrics = with_service(held, use, max_queue_tokens=8, max_item_tokens=8)
    assert answers == [1, 2]
    assert 'outcome="refused"} 1.0' in metrics


def test_who_has_left_costs_no_compute(pipeline):
    held = Held(pipeline)

    async def use(service: Service) -> Any:
        first = asyncio.ensure_future(service.answer(CallContext(), [text("the cat")]))
        await asyncio.to_thread(held.busy.wait, 20)

        def gone(left: Callable[[], None]) -> None:
            asyncio.get_running_loop().call_later(0.01, left)

        with pytest.raises(ClientGone):
            await service.answer(CallContext(watch=gone), [text("the dog")])
        cancelled = asyncio.ensure_future(service.answer(CallContext(), [text("the house")]))
        await asyncio.sleep(0.01)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert service.queue.tokens == 0
        held.go.set()
        await first

    _, metrics = with_service(held, use)
    assert held.batches == [["the cat"]]
    assert 'bertology_items_total{delta="mood",outcome="dropped"} 2.0' in metrics


def test_a_deadline_that_passes_in_the_queue_costs_no_compute(pipeline):
    held = Held(pipeline)

    async def use(service: Service) -> Any:
        first = asyncio.ensure_future(service.answer(CallContext(), [text("the cat")]))
        await asyncio.to_thread(held.busy.wait, 20)
        with pytest.raises(Expired, match=r"no answer within 0.02 s"):
            await service.answer(CallContext(seconds=0.02), [text("the dog")] * 2)
        assert service.queue.tokens == 0
        patient = asyncio.ensure_future(service.answer(CallContext(seconds=20), [text("the house")]))
        await asyncio.sleep(0.01)
        held.go.set()
        return [await first, await patient]

    _, metrics = with_service(held, use)
    assert held.texts == ["the cat", "the house"]
    assert 'bertology_items_total{delta="mood",outcome="expired"} 2.0' in metrics


def test_no_call_waits_longer_than_the_configuration_allows(pipeline):
    held = Held(pipeline)

    async def use(service: Service) -> Any:
        with pytest.raises(Expired, match=r"no answer within 1 s"):
            await service.answer(CallContext(seconds=50), [text("the cat")])
        held.go.set()

    with_service(held, use, max_call_seconds=1.0)


def test_what_is_charged_too_much_is_never_queued(pipeline):
    heard: list[int] = []

    def charge(tokens: int) -> None:
        heard.append(tokens)
        raise RateLimited("too much")

    async def use(service: Service) -> Any:
        with pytest.raises(RateLimited, match="too much"):
            await service.answer(paying(charge), several(2))
        assert service.queue.items == 0

    with_service(pipeline, use)
    assert heard == [12]


def test_a_flood_for_one_delta_is_refused_while_others_are_served_next(pipeline):
    """The flood fills its own lane only, and a batch after the light delta's arrival holds its work."""
    held = Held(pipeline)

    async def use(service: Service) -> Any:
        first = asyncio.ensure_future(service.answer(CallContext(), [text("first")]))
        await asyncio.to_thread(held.busy.wait, 20)
        flood = [asyncio.ensure_future(service.answer(CallContext(), [text("flood")])) for _ in range(20)]
        await asyncio.sleep(0.01)
        with pytest.raises(RateLimited, match="queue of delta 'mood' is full"):
            await service.answer(CallContext(), [text("flood")])
        light = asyncio.ensure_future(service.answer(CallContext(), [Request("grade", {"text": "light"})]))
        await asyncio.sleep(0.01)
        held.go.set()
        return await asyncio.gather(first, *flood, light)

    answers, _ = with_service(held, use, max_batch_tokens=12, max_delta_tokens=60, max_item_tokens=60)
    assert len(answers) == 22
    assert held.batches[0] == ["first"]
    assert "light" in held.batches[1]


def test_what_waits_together_is_answered_in_one_batch_of_all_kinds_and_tasks(pipeline):
    requests = [Request(name, record) for name, record in RECORDS.items()]
    batches: list[set[str]] = []

    class Seen(Held):
        def run(self, jobs: Any) -> Any:
            self.busy.set()
            assert self.go.wait(20)
            batches.append({job.request.delta for job in jobs})
            return self.pipeline.run(jobs)

    held = Seen(pipeline)

    async def use(service: Service) -> Any:
        first = asyncio.ensure_future(service.answer(CallContext(), [text("the cat")]))
        await asyncio.to_thread(held.busy.wait, 20)
        calls = [asyncio.ensure_future(service.answer(CallContext(), [request])) for request in requests]
        await asyncio.sleep(0.02)
        held.go.set()
        return await asyncio.gather(first, *calls)

    with_service(held, use)
    assert batches == [{"mood"}, set(RECORDS)]


def test_a_failing_batch_hurts_only_its_own_call(pipeline, monkeypatch):
    run = pipeline.run

    def failing(jobs: Any) -> Any:
        if any("bad" in job.request.record["text"] for job in jobs):
            raise ValueError("a fault")
        return run(jobs)

    monkeypatch.setattr(pipeline, "run", failing)

    async def use(service: Service) -> Any:
        good = [asyncio.ensure_future(service.answer(CallContext(), [text("the cat")])) for _ in range(3)]
        with pytest.raises(ValueError, match="a fault"):
            await service.answer(CallContext(), [text("bad")])
        return await asyncio.gather(*good)

    answers, metrics = with_service(pipeline, use)
    assert [len(answer) for answer in answers] == [1, 1, 1]
    assert 'bertology_items_total{delta="mood",outcome="failed"} 1.0' in metrics


def test_stopping_answers_what_was_accepted_and_refuses_the_rest(pipeline):
    held = Held(pipeline)

    async def use(service: Service) -> Any:
        accepted = [asyncio.ensure_future(service.answer(CallContext(), [text("the cat")])) for _ in range(5)]
        await asyncio.to_thread(held.busy.wait, 20)
        service.drain()
        assert not service.ready
        late = asyncio.ensure_future(
            service.answer(CallContext(), [text("the dog")])
        )  # draining, not stopped: still taken
        await asyncio.sleep(0.01)
        stopping = asyncio.ensure_future(service.stop())
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded, match="stopping"):
            await service.answer(CallContext(), [text("the house")])
        held.go.set()
        assert await stopping
        return await asyncio.gather(*accepted, late)

    answers, _ = with_service(held, use)
    assert len(answers) == 6


def test_warm_up_answers_before_the_service_starts_and_finds_the_size_of_batches(pipeline):
    metrics = Metrics()
    service = Service(Registry(pipeline), ServerConfig.of(max_batch_tokens=256), metrics)
    times: BatchTimes = service.queue.times
    guess = times.per_token
    warm_up(pipeline, times)
    assert times.per_token != guess
    assert f"bertology_batch_budget_tokens {times.budget}.0" in metrics.render().decode()


def test_answers_after_the_loop_has_closed_are_logged_not_raised(pipeline, caplog):
    service = Service(Registry(pipeline), ServerConfig(), Metrics())

    async def start() -> None:
        service.start()

    asyncio.run(start())
    service._deliver([object()], [ValueError()])
    assert "1 answers came after the server had stopped" in caplog.text
    asyncio.run(service.stop())


def test_labels_that_are_known_are_not_embedded_again(pipeline):
    """Rows of labels stay from call to call; what is computed, charged and counted is what was not known."""
    charged = []
    asked = {"text": "the dog was late", "labels": ["early_dog", "late_dog", "a cat in London"]}

    async def use(service: Service) -> Any:
        found = []
        for record in (asked, asked, {**asked, "labels": ["late_dog", "blue"]}):
            found += await service.answer(paying(charged.append), [Request("labels", record)])
        return found

    (first, second, third), metrics = with_service(pipeline, use)
    assert first.answer["scores"] == pytest.approx(second.answer["scores"], abs=1e-5)
    assert third.answer["scores"].keys() == {"late_dog", "blue"}
    text_alone = charged[1]
    assert charged == [text_alone + 4 + 4 + 6, text_alone, text_alone + 3]
    assert 'bertology_label_rows_total{delta="labels",result="miss"} 4.0' in metrics
    assert 'bertology_label_rows_total{delta="labels",result="hit"} 4.0' in metrics


def test_a_call_of_more_labels_than_a_batch_takes_is_divided(pipeline):
    labels = [f"{a} {b}" for a in ("cat", "dog", "river", "house") for b in ("red", "blue", "cold", "good", "early")]
    request = Request("labels", {"text": "the film was great", "labels": labels}, logits=True)
    alone = pipeline.run([pipeline.prepare(request)])[0].answer
    pipeline.loaded("labels").rows = RowCache()

    async def use(service: Service) -> Any:
        service.queue.times.budget = service.queue.times.hurried = 16
        return await service.answer(CallContext(), [request])

    (found,), _ = with_service(pipeline, use)
    assert found.answer["logits"] == pytest.approx(alone["logits"], abs=1e-4)


def test_one_text_for_many_deltas_is_one_batch_and_counted_as_what_it_computes(pipeline):
    names = ("raw", "base", "mood", "grade")
    requests = [Request(name, {"text": "the cat was good"}, logits=True) for name in names]
    alone = [pipeline.run([pipeline.prepare(request)])[0].as_dict() for request in requests]
    held, paid = Held(pipeline), list[int]()
    held.go.set()

    async def use(service: Service) -> Any:
        return await service.answer(paying(paid.append), requests)

    found, shown = with_service(held, use)
    for one, other in zip(found, alone, strict=True):
        assert one.as_dict().keys() == other.keys()
        assert one.as_dict().get("logits", one.answer.get("embedding")) == pytest.approx(
            other.get("logits", other.get("embedding")), abs=1e-5
        )
    assert len(held.batches) == 1
    assert paid == [6 + 1 + 6 + 6]  # the second probe pays for one row; the others change the first layer
    assert "bertology_shared_rows_total 5.0" in shown
