"""Gold answers of extractive question answering, in the forms that data sets have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bertology_serve.errors import DataError
from bertology_serve.tasks.fields import kind_of, required

GoldAnswer = tuple[int, int]


def read_answers(record: Mapping[str, Any], where: str, context: str) -> tuple[GoldAnswer, ...]:
    """Character spans (start, end) of the gold answers in the context; empty when there is none.

    ``answers`` may be ``{"text": [...], "answer_start": [...]}``, a list of ``{"text", "answer_start" or "start"}``, a
    list of texts, or one text. Without a start the answer's first occurrence counts; with one that does not fit, the
    occurrence nearest to it. White space at the ends is dropped. An answer that the context lacks is a DataError.
    """
    value = required(record, where, "answers", "answers (an empty list: there is none)")
    spans = (_locate(text, start, where, context) for text, start in _pairs(value, where))
    return tuple(dict.fromkeys(spans))


def _pairs(value: Any, where: str) -> list[tuple[Any, Any]]:
    """(text, start or None) of each answer."""
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start", value.get("start"))
        if isinstance(texts, str):
            return [(texts, starts)]
        texts = _items(texts, where, "answers.text")
        starts = [None] * len(texts) if starts is None else _items(starts, where, "answers.answer_start")
        if len(texts) != len(starts):
            raise DataError(f"{where}: field 'answers' has {len(texts)} texts and {len(starts)} starts; expected pairs")
        return list(zip(texts, starts, strict=True))
    if isinstance(value, str):
        return [(value, None)]
    return [_pair(item) for item in _items(value, where, "answers")]


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        return item.get("text"), item.get("answer_start", item.get("start"))
    return item, None


def _items(value: Any, where: str, name: str) -> list[Any]:
    if value is None or isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise DataError(f"{where}: field {name!r} is {kind_of(value)}; expected a list")
    return list(value)


def _locate(text: Any, start: Any, where: str, context: str) -> GoldAnswer:
    """The span of an answer, checked against the context."""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: field 'answers' holds {kind_of(text)}; expected a text that is not empty")
    if start is not None and (isinstance(start, bool) or not isinstance(start, int)):
        raise DataError(f"{where}: field 'answers' has the start {kind_of(start)}; expected an integer")
    indent = len(text) - len(text.lstrip())
    text = text.strip()
    hint = 0 if start is None else start + indent
    if context[hint : hint + len(text)] == text and hint >= 0:
        return hint, hint + len(text)
    hint = max(hint, 0)
    before, after = context.rfind(text, 0, hint + len(text)), context.find(text, hint)
    found = [place for place in (before, after) if place >= 0]
    if not found:
        raise DataError(f"{where}: field 'answers' holds {kind_of(text)}, which the context does not contain")
    nearest = min(found, key=lambda place: abs(place - hint))
    return nearest, nearest + len(text)
