from __future__ import annotations

import json

import pytest

from bertology_serve.encoder.pipeline import Prediction
from bertology_serve.errors import DataError
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


@pytest.mark.parametrize(
    ("body", "message"),
    [
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
