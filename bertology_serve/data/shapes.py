"""Rows of well-known data sets -> records of our tasks. Each reads the hub's columns, or its authors' files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bertology_serve.errors import DataError

Row = Mapping[str, Any]
Shape = Callable[[Row, str], Iterator[Row]]

TRUE, FALSE = "True", "False"


def plain(row: Row, where: str) -> Iterator[Row]:
    """The row as it is."""
    yield row


def copa(row: Row, where: str) -> Iterator[Row]:
    """COPA: the two choices in one list. A label that is the name of a column becomes its index."""
    choices = [_taken(row, where, name) for name in ("choice1", "choice2")]
    names = {"choice1": 0, "choice2": 1}
    label = row.get("label")
    yield {
        **_without(row, names),
        "choices": choices,
        "label": names.get(label, label) if isinstance(label, str) else label,
    }


def wic(row: Row, where: str) -> Iterator[Row]:
    """WiC as a pair: the word before the first sentence. (The benchmark's own baseline reads the words' vectors.)"""
    word, first, second = (_taken(row, where, name) for name in ("word", "sentence1", "sentence2"))
    yield {"text": f"{word}: {first}", "text_pair": second, "label": row.get("label")}


def wsc(row: Row, where: str) -> Iterator[Row]:
    """WSC as a pair: the text, and who the pronoun may be."""
    text, name, pronoun = (_taken(row, where, name) for name in ("text", "span1_text", "span2_text"))
    yield {"text": text, "text_pair": f"{pronoun}: {name}", "label": row.get("label")}


def multirc(row: Row, where: str) -> Iterator[Row]:
    """MultiRC as a pair: the paragraph, and question and answer; ``group`` is the question."""
    text, question, answer = (_taken(row, where, name) for name in ("paragraph", "question", "answer"))
    place = row.get("idx") or {}
    group = f"{place.get('paragraph')}/{place.get('question')}"
    yield {"text": text, "text_pair": f"{question} {answer}", "label": row.get("label"), "group": group}


def record(row: Row, where: str) -> Iterator[Row]:
    """ReCoRD as pairs: the passage, and the query with each entity in the gap; ``group`` is the query.

    ``entity`` and ``golds`` are what the official metric compares.
    """
    passage, query, entities = (_taken(row, where, name) for name in ("passage", "query", "entities"))
    golds = list(row.get("answers") or ())
    group = row.get("idx")
    for entity in dict.fromkeys(entities):
        label = TRUE if entity in golds else FALSE
        text = query.replace("@placeholder", entity)
        facts = {"group": str(group.get("query", where) if group else where), "entity": entity, "golds": golds}
        yield {"text": passage.replace("\n@highlight\n", " "), "text_pair": text, "label": label, **facts}


def mrqa(row: Row, where: str) -> Iterator[Row]:
    """MRQA: a question a record. The authors' files hold the questions of a context in ``qas``, after a header line."""
    if "header" in row:
        return
    context = _taken(row, where, "context")
    for asked in row.get("qas", (row,)):
        if "detected_answers" not in asked and "answers" in asked:
            yield asked  # SQuAD's own shape
            continue
        found = _taken(asked, where, "detected_answers")
        texts, starts = _hub_answers(found) if isinstance(found, Mapping) else _own_answers(found)
        answers = {"text": texts, "answer_start": starts}
        yield {"question": _taken(asked, where, "question"), "context": context, "answers": answers}


def _hub_answers(found: Row) -> tuple[list[str], list[int]]:
    """``{"text": [...], "char_spans": [{"start": [...], "end": [...]}, ...]}``: the first place of each."""
    return list(found["text"]), [int(spans["start"][0]) for spans in found["char_spans"]]


def _own_answers(found: Any) -> tuple[list[str], list[int]]:
    """``[{"text": ..., "char_spans": [[start, end], ...]}, ...]``."""
    return [one["text"] for one in found], [int(one["char_spans"][0][0]) for one in found]


def _taken(row: Row, where: str, name: str) -> Any:
    if row.get(name) is None:
        raise DataError(f"{where}: column {name!r} is missing (columns found: {', '.join(map(str, row)) or 'none'})")
    return row[name]


def _without(row: Row, names: Mapping[str, int]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}
