from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest

from bertology_serve.encoder.pipeline import Prediction
from bertology_serve.errors import DataError, LimitError, Unsupported
from bertology_serve.serving.protocol import native
from bertology_serve.serving.protocol.native import describe, is_tei, write_answers

KINDS = {
    "mood": "classification",
    "topic": "classification",
    "pii": "token-classification",
    "a": "regression",
    "b": "embedding",
}


def find(name: str) -> Any:
    return SimpleNamespace(task=SimpleNamespace(kind=KINDS[name]))


def read_call(body: bytes, most: float = math.inf) -> native.NativeCall:
    return native.read_call(body, most, find)


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


def test_options_are_for_the_deltas_that_take_them():
    call = read_call(b'{"deltas": ["mood", "pii"], "text": "a", "redact": true, "logits": true, "delta": null}')
    assert [request.record.get("redact") for request in call.requests] == [None, True]
    assert all(request.logits and request.record["text"] == "a" for request in call.requests)
    several = read_call(b'{"deltas": ["pii", "b"], "text": "a", "dimensions": 8, "patterns": true}')
    assert [sorted(request.record) for request in several.requests] == [
        ["delta", "patterns", "text"],
        ["delta", "dimensions", "text"],
    ]


@pytest.mark.parametrize("option", [{"redact": "nope"}, {"patterns": True}, {"dimensions": 4}, {"input_type": "query"}])
def test_an_option_that_none_takes_is_refused(option):
    """Nothing that was to be redacted goes back as it is."""
    body = json.dumps({"deltas": ["mood", "topic"], "text": "Ada"} | option).encode()
    with pytest.raises(Unsupported, match=f"request: field '{next(iter(option))}' is for .* none of the deltas does"):
        read_call(body)


def test_an_item_for_several_deltas_is_no_call_of_tei():
    assert is_tei(b'{"inputs": "a", "model": "x"}')
    assert not is_tei(b'{"deltas": ["mood"], "text": "a", "inputs": "b"}')


def test_answers_are_counted_not_items():
    body = b'[{"deltas": ["a", "b"], "text": ""}, {"deltas": ["a", "b"], "text": ""}]'
    assert len(read_call(body, 4).requests) == 4
    with pytest.raises(LimitError, match="4 items; at most 3"):
        read_call(body, 3)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"deltas": "a"}', "request: field 'deltas' is a text; expected a list of names"),
        (b'{"deltas": []}', "field 'deltas' holds nothing; expected names"),
        (b'[{"deltas": ["a", 1]}]', "item 0: field 'deltas' holds a number; expected names"),
        (b'[{"deltas": ["a", ""]}]', "item 0: field 'deltas' holds a text; expected names"),
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
        "pairs": False,
    }
    assert describe(registry.find("base"))["kinds"] == []
