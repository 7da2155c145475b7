"""Choosing answer spans from start and end logits over the windows of a context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bertology_serve.tasks.spec import Encoding

CANDIDATES = 20
CharSpan = tuple[int, int]


def best_spans(
    context: str, encodings: Sequence[Encoding], outputs: Sequence[Tensor], longest: int
) -> tuple[list[tuple[CharSpan, float]], float]:
    """The best spans of a context over all windows, best first, and the score of no answer.

    ``outputs`` are [len, 2] start and end logits a window. A span's score is the sum of its start and end logits, the
    greatest where windows overlap; spans of more than ``longest`` tokens are left out, white space at their ends is
    taken off (byte-level tokens hold the space before a word), and at most 20 come back. No
    answer scores what [CLS] has as start and end, the least over the windows: one window that sees an answer is enough
    (Devlin et al. 2019, arXiv 1810.04805, section 4.3).
    """
    spans: dict[CharSpan, float] = {}
    null = np.inf
    for encoding, output in zip(encodings, outputs, strict=True):
        logits = output.double().numpy()
        null = min(null, float(logits[0].sum()))
        for first, last, score in _candidates(encoding, logits, longest):
            span = trimmed(context, encoding.offsets[first][0], encoding.offsets[last][1])
            if span[0] < span[1]:
                spans[span] = max(score, spans.get(span, -np.inf))
    ranked = sorted(spans.items(), key=lambda item: (-item[1], item[0]))
    return ranked[:CANDIDATES], null


def trimmed(context: str, start: int, end: int) -> CharSpan:
    """The span without white space at its ends; empty when nothing else is in it."""
    text = context[start:end]
    start += len(text) - len(text.lstrip())
    return start, start + len(text.strip())


def rows_of(encoding: Encoding, span: CharSpan) -> tuple[int, int]:
    """First and last row of the context's tokens that touch a character span; (0, 0) when part of it is outside."""
    rows = [row for row, part in enumerate(encoding.parts) if part == 1]
    touching = [row for row in rows if encoding.offsets[row][1] > span[0] and encoding.offsets[row][0] < span[1]]
    whole = rows and encoding.offsets[rows[0]][0] <= span[0] and encoding.offsets[rows[-1]][1] >= span[1]
    return (touching[0], touching[-1]) if whole and touching else (0, 0)


def _candidates(encoding: Encoding, logits: NDArray[np.float64], longest: int) -> list[tuple[int, int, float]]:
    """(first row, last row, score) of a window's best spans."""
    rows = np.flatnonzero(np.asarray(encoding.parts) == 1)
    if not len(rows):
        return []
    starts, ends = logits[rows, 0], logits[rows, 1]
    width = min(longest, len(rows))
    padded = np.concatenate([ends, np.full(width - 1, -np.inf)])
    table = starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, width)
    flat = table.ravel()
    top = np.argsort(-flat, kind="stable")[:CANDIDATES]
    pairs = [(divmod(int(place), width), float(flat[place])) for place in top if flat[place] > -np.inf]
    return [(int(rows[start]), int(rows[start + length]), score) for (start, length), score in pairs]
