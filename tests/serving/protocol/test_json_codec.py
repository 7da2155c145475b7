from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertology_serve.errors import DataError, LimitError
from bertology_serve.serving.protocol import json_codec
from bertology_serve.serving.protocol.json_codec import decode, encode, encode_list, shown


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty"),
        (b"{", "is not JSON"),
        (b"NaN", "is not JSON"),
        (b'{"a": 1} x', "is not JSON"),
        (b"[1e999]", "wrong shape: Number out of range"),
        (b"9" * 5000, "wrong shape: Integer value out of range"),
        (b'"\xff"', "not UTF-8"),
        (b'"\\ud800"', r"holds \\ud800, half of a surrogate pair"),
        (memoryview(b'"a\\uD83D"'), r"holds \\uD83D, half of a surrogate pair"),
        (b'"\\ude00\\ud83d\\ude00"', r"holds \\ude00, half of a surrogate pair"),
        (b'"\\ud83d\\ude00', "is not JSON"),
        (b"[" * 20_000, "nested too deeply"),
    ],
    ids=lambda value: str(value if isinstance(value, str) else bytes(value))[:20],
)
def test_whatever_is_wrong_is_a_data_error(body, message):
    with pytest.raises(DataError, match=message):
        decode(body)


def test_a_wrong_type_is_named_with_its_place():
    with pytest.raises(DataError, match=r"Expected `int`, got `str` - at `\$\[1\]`"):
        decode(b'[1, "a"]', list[int])


@given(st.binary())
def test_any_bytes_give_a_value_or_a_data_error(body):
    with contextlib.suppress(DataError):
        decode(body)


def test_values_are_shown_without_their_text():
    assert [shown(value) for value in (None, True, 1, 0.5, "secret", [], {})] == [
        "null", "a boolean", "a number", "a number", "a text", "a list", "an object",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b'"",' * json_codec.MOST_VALUES + b'"", ""]',
        b"[" + b"[]," * json_codec.MOST_CONTAINERS + b"[]]",
        b"[" + b'{"a":1},' * json_codec.MOST_CONTAINERS + b"1]",
        b"[" + b'"' + b'\\"' * json_codec.SMALL + b'",' + b"1," * json_codec.MOST_VALUES + b"1, 1]",
    ],
    ids=["texts", "lists", "objects", "after quotes in a text"],
)
def test_values_are_counted_before_they_are_made(body, monkeypatch):
    monkeypatch.setattr(json_codec.msgspec.json, "decode", None)
    with pytest.raises(LimitError, match=r"more than 131072 values, or 32768 lists and objects; send several"):
        decode(body)


@pytest.mark.parametrize("text", ["," * 300_000, "[{" * 50_000, '\\"[' * 50_000, "\\" * 200_001, '"' * 300_000])
def test_what_stands_in_a_text_is_no_value(text):
    assert decode(encode([text, 1, {"a": text}])) == [text, 1, {"a": text}]


@given(st.lists(st.one_of(st.text(), st.integers(), st.none(), st.lists(st.floats(-1, 1)))))
def test_a_list_written_value_by_value_is_the_same(values):
    assert encode_list(values) == encode(values)
