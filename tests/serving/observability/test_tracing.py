"""Spans with OpenTelemetry's own SDK: what they hold, whose children they are, and that no text is in them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from bertology_serve.errors import Unsupported
from bertology_serve.serving.observability.logs import Tracing
from tests.serving.running import Running, running, wait

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


@pytest.fixture
def traced(pipeline, spans) -> Iterator[Running]:
    with running(pipeline, traces=True) as server:
        yield server


def named(spans: InMemorySpanExporter) -> dict[str, Any]:
    return {span.name: span for span in spans.get_finished_spans()}


def test_a_call_has_a_span_with_queue_and_batch_below_it(traced, spans):
    item = {"delta": "mood", "text": "SECRET"}
    assert traced.client.post("/predict?x=SECRET", json=item, headers={"traceparent": PARENT}).status_code == 200
    wait(lambda: len(spans.get_finished_spans()) == 3)
    found = named(spans)
    call, queue, batch = found["POST"], found["queue"], found["batch"]
    assert f"{call.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{call.parent.span_id:016x}" == PARENT.split("-")[2]
    assert queue.parent.span_id == batch.parent.span_id == call.context.span_id
    assert dict(call.attributes) == {
        "http.request.method": "POST", "url.path": "/predict", "http.response.status_code": 200,
    }  # fmt: skip
    assert batch.attributes["bertology.deltas"] == ("mood",)
    assert batch.attributes["bertology.outcome"] == "answered"
    slack = 10_000_000_000  # ns: the two clocks are read one after the other, with a pause between on a busy machine
    assert call.start_time - slack <= queue.start_time <= queue.end_time == batch.start_time < batch.end_time
    assert "SECRET" not in str([span.to_json() for span in spans.get_finished_spans()])


def test_refusals_have_a_span_and_nothing_below(traced, spans):
    assert traced.client.get("/nothing").status_code == 404
    wait(lambda: spans.get_finished_spans())
    (span,) = spans.get_finished_spans()
    assert span.attributes["http.response.status_code"] == 404


def test_without_its_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(Unsupported, match=r"pip install 'bertology-serve\[otel\]'"):
        Tracing()
