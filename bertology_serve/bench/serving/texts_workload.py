"""The sequences that a benchmark answers: texts of exactly known length in tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from bertology_serve.errors import SpecError

SHORTEST = 3


@dataclass(frozen=True)
class Workload:
    """``sequences`` texts over ``deltas`` LoRA deltas.

    Their lengths in tokens are the quantiles of the lognormal distribution with that ``mean`` whose topmost quantile is
    ``longest``: nothing is left to the luck of a draw. ``seed`` decides the order of arrival, texts and deltas.
    """

    sequences: int = 64
    deltas: int = 8
    mean: float = 24.0
    longest: int = 128
    rank: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.deltas <= self.sequences:
            raise SpecError(f"deltas is {self.deltas}; expected 1 to {self.sequences}, one sequence each at least")
        if not SHORTEST < self.mean < self.longest:
            raise SpecError(f"mean is {self.mean}; expected more than {SHORTEST} and less than longest, {self.longest}")


def lengths(work: Workload) -> list[int]:
    """Tokens of each sequence, special tokens included, in order of arrival."""
    places = [(number + 0.5) / work.sequences for number in range(work.sequences)]
    normal = [NormalDist().inv_cdf(place) for place in places]
    top, ratio = normal[-1], 2 * math.log(work.longest / work.mean)
    sigma = top - math.sqrt(max(top**2 - ratio, 0.0))  # solves mean · exp(sigma · top - sigma² / 2) = longest
    found = [work.mean * math.exp(sigma * value - sigma**2 / 2) for value in normal]
    rounded = np.clip(np.rint(found), SHORTEST, work.longest).astype(int)
    return [int(length) for length in np.random.default_rng(work.seed).permutation(rounded)]


def owners(work: Workload) -> list[int]:
    """The number of the delta of each sequence, in order of arrival: every delta has about as many."""
    draw = np.random.default_rng(work.seed + 1)
    return [int(owner) for owner in draw.permutation(np.arange(work.sequences) % work.deltas)]


def texts(work: Workload, tokenizer: Any, lines: Sequence[str] = ()) -> list[str]:
    """A text for each length: the words of real ``lines`` in order, or of words that are one token each."""
    if lines:
        return fitted(lengths(work), tokenizer, lines)
    special = len(tokenizer("").input_ids)
    draw, known = np.random.default_rng(work.seed + 2), _words(tokenizer)
    return [" ".join(draw.choice(known, length - special)) for length in lengths(work)]


def fitted(sizes: Sequence[int], tokenizer: Any, lines: Sequence[str]) -> list[str]:
    """A text of each number of tokens, special tokens included: the words of ``lines`` in order."""
    special = len(tokenizer("").input_ids)
    words = itertools.cycle(word for line in lines for word in line.split())
    return [_fitted(words, size - special, tokenizer) for size in sizes]


def _fitted(words: Iterator[str], tokens: int, tokenizer: Any) -> str:
    """The next words that are together so many tokens; those that would be too many are passed over."""
    special, text = len(tokenizer("").input_ids), ""
    while len(tokenizer(text, verbose=False).input_ids) < tokens + special:
        longer = f"{text} {next(words)}".strip()
        text = longer if len(tokenizer(longer, verbose=False).input_ids) <= tokens + special else text
    return text


def _words(tokenizer: Any) -> list[str]:
    """Words that are one token, wherever they stand."""
    candidates = ["the", "of", "and", "in", "to", "a", "is", "for", "on", "with", "that", "by", "from", "at", "it"]
    special = len(tokenizer("").input_ids)
    good = [w for w in candidates if len(tokenizer(f"{w} {w}").input_ids) == special + 2]
    if not good:
        raise SpecError("this tokenizer has none of the usual English words as single tokens; choose another backbone")
    return good
