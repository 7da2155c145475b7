"""Spans in tag sequences, and their F1, as seqeval's default mode counts them."""

from __future__ import annotations

from collections.abc import Sequence

TagSpan = tuple[str, int, int]
OUTSIDE = ("O", "0")
PREFIXES = {"B": "B", "I": "I", "E": "E", "S": "S", "M": "I", "L": "E", "U": "S"}
"""Those of IOB and IOBES, and what they are called in BMES and BILOU."""


def spans_of(tags: Sequence[str]) -> list[TagSpan]:
    """(label, first word, word after the last) of each span.

    ``B-`` starts a span, and so does ``I-`` after ``O`` or after another label; ``E-`` ends and ``S-`` is a span of
    its own (BILOU calls them ``L-`` and ``U-``; BMES has ``M-`` for ``I-``). A tag without prefix counts as ``I-`` of
    itself, so runs of one part-of-speech tag are spans too; but for ``0``, which is ``O`` where tags are class indices.
    """
    spans: list[TagSpan] = []
    previous, label, start = "O", "", 0
    for index, tag in enumerate([*tags, "O"]):
        prefix, kind = split_tag(tag)
        begins = prefix != "O" and (prefix in "BS" or previous in "OES" or kind != label)
        if previous != "O" and (begins or prefix == "O"):
            spans.append((label, start, index))
        if begins:
            start = index
        previous, label = prefix, kind
    return spans


def split_tag(tag: str) -> tuple[str, str]:
    """A tag's prefix (one of B, I, E, S, O) and its label."""
    if tag in OUTSIDE:
        return "O", ""
    if len(tag) > 2 and tag[1] == "-" and tag[0] in PREFIXES:
        return PREFIXES[tag[0]], tag[2:]
    return "I", tag


def span_scores(gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro F1, precision and recall of spans over sentences: a span counts when label and both ends agree."""
    right = expected = given = 0
    for gold_tags, found_tags in zip(gold, found, strict=True):
        gold_spans, found_spans = set(spans_of(gold_tags)), set(spans_of(found_tags))
        right += len(gold_spans & found_spans)
        expected += len(gold_spans)
        given += len(found_spans)
    return {
        "f1": 2 * right / (given + expected) if given + expected else 0.0,
        "precision": right / given if given else 0.0,
        "recall": right / expected if expected else 0.0,
    }
