"""Exact match and F1 of answers, as SQuAD's official script has them (Rajpurkar et al. 2016, arXiv 1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(gold: str, found: str) -> float:
    """1 if both are equal once normalised, else 0."""
    return float(normalise(gold) == normalise(found))


def overlap_f1(gold: str, found: str) -> float:
    """F1 of the words that both share; when one side has no words, whether both have none."""
    gold_words, found_words = normalise(gold).split(), normalise(found).split()
    if not gold_words or not found_words:
        return float(gold_words == found_words)
    shared = sum((Counter(gold_words) & Counter(found_words)).values())
    return 2 * shared / (len(gold_words) + len(found_words))


def squad_scores(golds: Sequence[Sequence[str]], found: Sequence[str]) -> dict[str, float]:
    """Mean F1 and exact match, each the best over an example's gold answers (no gold answers: the empty text)."""
    pairs = [(gold or ("",), text) for gold, text in zip(golds, found, strict=True)]
    count = max(len(pairs), 1)
    return {
        "f1": sum(max(overlap_f1(gold, text) for gold in options) for options, text in pairs) / count,
        "exact": sum(max(exact(gold, text) for gold in options) for options, text in pairs) / count,
    }
