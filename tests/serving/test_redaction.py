"""Redaction from a body's bytes to an answer's: exact offsets whatever the text holds, in windows and in parts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import LimitError, Unsupported
from bertology_serve.kinds.lora import Lora
from bertology_serve.serving.protocol.native import read_call, write_answers
from bertology_serve.tasks.redaction import Redactor, restore
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.serving.running import running
from tests.tasks.test_redaction import trouble

TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
ASKED = {"redact": "replace", "patterns": "replace", "offsets": "utf16"}


@pytest.fixture(scope="module")
def pipeline(encoder: Encoder) -> Pipeline:
    windows = TaskSpec("token-classification", TAGS, 14, stride=4, long="windows")
    short = TaskSpec("token-classification", TAGS, 14)
    tasks = {"names": windows, "short": short, "mood": TaskSpec("classification", ("bad", "good"), 32)}
    return Pipeline(encoder, [tiny.delta(encoder, name, [Lora(rank=2)], task, 4) for name, task in tasks.items()])


def cut_exactly(span: dict[str, Any], text: str) -> bool:
    """Whether a span cuts the very characters, in both units."""
    units = text.encode("utf-16-le")[2 * span["start_utf16"] : 2 * span["end_utf16"]]
    return span["text"] == text[span["start"] : span["end"]] == units.decode("utf-16-le")


def test_two_thousand_texts_of_trouble_are_cut_exactly_and_restored(pipeline):
    texts = trouble(seed=20)
    items = [{"delta": "names", "text": text, **ASKED} for text in texts]
    call = read_call(
        json.dumps(items).encode(), 2000, pipeline.deltas.__getitem__
    )  # what is no ASCII goes as escapes, in halves of surrogate pairs
    answers = json.loads(write_answers(call, pipeline.answer(call.requests)))
    assert len(answers) == len(texts) == 2000
    for text, answer in zip(texts, answers, strict=True):
        assert all(cut_exactly(span, text) for span in [*answer["entities"], *answer["redactions"]]), ascii(text)
        assert restore(answer["redacted"], answer.get("placeholders", {})) == text
    assert sum(len(answer["entities"]) for answer in answers) > 2000
    assert sum(answer.get("windows", 1) > 1 for answer in answers) > 200
    assert sum("[EMAIL_1]" in answer["redacted"] for answer in answers) > 100


def test_the_pipeline_redacts_with_its_own_patterns_and_key(encoder):
    task = TaskSpec("token-classification", TAGS, 32)
    pipeline = Pipeline(encoder, [tiny.delta(encoder, "names", [Lora(rank=2)], task, 4)])
    pipeline.redactor = Redactor({"ORDER": "A-[0-9]+"}, key="a key of many characters")
    found = pipeline({"text": "order A-17", "redact": "keep", "patterns": {"ORDER": "hash"}}, delta="names").answer
    assert found["redacted"].startswith("order [ORDER:")
    words = pipeline({"tokens": ["order", "A-17"], "redact": "keep", "patterns": True}, delta="names").answer
    assert (words["redacted"], len(words["tags"])) == ("order [ORDER]", 2)


def test_what_is_not_read_is_not_let_through(pipeline):
    text = "the cat was good " * 10
    with pytest.raises(LimitError, match="tokens are not read, so that the text cannot be redacted"):
        pipeline({"text": text, "redact": True}, delta="short")
    assert pipeline({"text": text, "offsets": "utf16"}, delta="short").truncated
    with pytest.raises(Unsupported, match="classification finds no spans"):
        pipeline({"text": text, "redact": True}, delta="mood")


def test_of_several_deltas_those_redact_that_find_spans(pipeline):
    item = {"text": "Ada met bob@x.org", "deltas": ["mood", "names"], "redact": "keep", "patterns": True}
    call = read_call(json.dumps(item).encode(), 2, pipeline.deltas.__getitem__)
    found = json.loads(write_answers(call, pipeline.answer(call.requests)))["deltas"]
    assert found["names"]["redacted"] == "Ada met [EMAIL]"
    assert "redacted" not in found["mood"]


def test_a_server_redacts_long_texts_in_parts(pipeline):
    text = "\U0001f600 Ada went to Paris . " * 30
    alone = pipeline({"text": text, **ASKED}, delta="names").as_dict()
    with running(pipeline, max_batch_tokens=32) as server:
        found = server.post("/predict", {"delta": "names", "text": text, **ASKED}).json()
        refused = server.post(
            "/predict", {"delta": "names", "text": text, "redact": True, "patterns": {"(a+)+b": "mask"}}
        )
        short = server.post("/predict", {"delta": "short", "text": text, "redact": True})
    assert found["windows"] == alone["windows"] > 10
    assert found["redacted"] == alone["redacted"]
    assert found["placeholders"] == alone["placeholders"]
    assert all(cut_exactly(span, text) for span in found["redactions"])
    assert refused.status_code == 400
    assert "names the unknown '(a+)+b'" in refused.json()["error"]
    assert short.status_code == 413
