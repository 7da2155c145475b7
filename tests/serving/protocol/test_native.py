from __future__ import annotations

import json

import pytest

from bertology_serve.encoder.pipeline import Prediction
from bertology_serve.errors import DataError, LimitError
from bertology_serve.serving.protocol.native import describe, read_call, write_answers

ANSWER = Prediction("mood", "1", "classification", {"label": "good", "score": 0.5})


def test_a_list_is_answered_with_a_list_an_object_with_an_object():
    single = read_call(b'{"delta": "mood", "text": "a", "id": "x", "logits": true}')
    assert single.single
    assert (single.requests[0].delta, single.requests[0].logits) == ("mood", True)
    assert json.loads(write_answers(single, [ANSWER])) == {"id": "x", **ANSWER.as_dict()}
    several = read_call(b'[{"delta": "mood", "text": "a"}, {"delta": "mood", "text": "b", "id": 0}]')
    assert [request.where for request in several.requests] == ["item 0", "item 1"]
    assert json.loads(write_answers(several, [ANSWER, ANSWER])) == [ANSWER.as_dict(), {"id": 0, **ANSWER.as_dict()}]


def test_several_deltas_of_one_item_are_answered_by_name():
    single = read_call(b'{"deltas": ["mood", "topic"], "text": "a", "id": 7}')
    assert [(request.delta, request.record["text"]) for request in single.requests] == [("mood", "a"), ("topic", "a")]
    other = Prediction("topic", "2", "classification", {"label": "art", "score": 0.9})
    both = {"mood": ANSWER.as_dict(), "topic": other.as_dict()}
    assert json.loads(write_answers(single, [ANSWER, other])) == {"id": 7, "deltas": both}
    mixed = read_call(
        b'[{"delta": "mood", "text": "a"}, {"deltas": ["mood", "topic"], "text": "b"}, {"delta": "topic", "text": "c"}]'
    )
    answers = [ANSWER, ANSWER, other, other]
    assert json.loads(write_answers(mixed, answers)) == [ANSWER.as_dict(), {"deltas": both}, other.as_dict()]


def test_answers_are_counted_not_items():
    body = b'[{"deltas": ["a", "b"], "text": ""}, {"deltas": ["a", "b"], "text": ""}]'
    assert len(read_call(body, 4).requests) == 4
    with pytest.raises(LimitError, match="4 items; at most 3"):
        read_call(body, 3)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"deltas": "a"}', "request: field 'deltas' is a text; expected a list of names"),
        (b'{"deltas": []}', "field 'deltas' is a list; expected a list of names"),
        (b'[{"deltas": ["a", 1]}]', "item 0: field 'deltas' is a list"),
        (b'{"deltas": ["a", "a"]}', "field 'deltas' names a delta twice"),
        (b'{"deltas": ["a"], "delta": "b"}', "'delta' and 'deltas' both name deltas"),
        (b"1", "the body is a number; expected an object with 'delta'"),
        (b"[[]]", "item 0: is a list"),
        (b'[{"delta": "a"}, {}]', "item 1: field 'delta' is null"),
        (b'{"delta": ""}', "request: field 'delta' is a text; expected the name of a delta"),
        (b'{"delta": "a", "id": []}', "field 'id' is a list"),
        (b'{"delta": "a", "id": true}', "field 'id' is a boolean"),
        (b'{"delta": "a", "logits": 1}', "field 'logits' is a number"),
    ],
)
def test_wrong_shapes_are_named(body, message):
    with pytest.raises(DataError, match=message):
        read_call(body)


def test_describe(registry):
    assert describe(registry.find("mood")) == {
        "name": "mood",
        "version": "1",
        "task": "classification",
        "labels": ["bad", "good", "so-so"],
        "kinds": ["lora"],
        "max_length": 32,
        "bytes": registry.find("mood").bytes,
        "metrics": {},
    }
    assert describe(registry.find("base"))["kinds"] == []
