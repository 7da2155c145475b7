"""Metrics over plain sequences, as fractions (0 where a ratio is undefined, as scikit-learn has it), and how sure
they are: bootstrap intervals over items, and McNemar's test. Seeded: the same answer each time."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def ratio(part: float, whole: float) -> float:
    """A quotient, 0 where there is nothing to divide by."""
    return float(part / whole) if whole else 0.0


def mean(values: Floats | Flags) -> float:
    """The mean, 0 where there are no values."""
    return ratio(values.sum(), len(values))


def of_one(values: Sequence[float]) -> Floats:
    """[N, 2]: values whose mean is the metric."""
    return np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], 1)


def f1_of(gold: Flags, found: Flags, axis: int) -> Floats:
    """F1 of each column (axis 0) or row (axis 1) of two tables."""
    total = gold.sum(axis) + found.sum(axis)
    scores: Floats = 2 * (gold & found).sum(axis) / np.maximum(total, 1)
    return scores


def accuracy(gold: Sequence[str], found: Sequence[str]) -> float:
    """Share of equal entries."""
    return sum(a == b for a, b in zip(gold, found, strict=True)) / len(gold) if gold else 0.0


def macro_f1(gold: Sequence[str], found: Sequence[str]) -> float:
    """Mean F1 over the labels that occur in gold or found."""
    table = _confusion(gold, found)
    total = table.sum(0) + table.sum(1)
    return float(np.mean(2 * np.diag(table) / total)) if len(total) else 0.0


def positive_f1(gold: Sequence[str], found: Sequence[str], positive: str) -> float:
    """F1 of one label."""
    right = sum(a == b == positive for a, b in zip(gold, found, strict=True))
    count = sum(a == positive for a in (*gold, *found))
    return 2 * right / count if count else 0.0


def mcc(gold: Sequence[str], found: Sequence[str]) -> float:
    """Matthews correlation for any number of labels (Gorodkin 2004)."""
    table = _confusion(gold, found)
    n, right = table.sum(), np.trace(table)
    of_gold, of_found = table.sum(1), table.sum(0)
    spread = (n * n - of_gold @ of_gold) * (n * n - of_found @ of_found)
    return float((n * right - of_gold @ of_found) / np.sqrt(spread)) if spread > 0 else 0.0


BINS = 15


def gaps(certainty: Floats) -> Floats:
    """[N, 15]: for each probability, in its bin (of equal width), by how much what came true exceeds it.

    ``certainty`` is [N, 2]: probabilities, and whether each came true.
    """
    scores, true = certainty.T
    found = np.zeros((len(scores), BINS))
    found[np.arange(len(scores)), np.minimum((scores * BINS).astype(int), BINS - 1)] = true - scores
    return found


def calibration_error(certainty: Floats) -> float:
    """ECE in 15 bins (Naeini et al. 2015): how far probabilities are from how often they come true, on average."""
    return ratio(np.abs(gaps(certainty).sum(0)).sum(), len(certainty))


def mse(gold: Sequence[float], found: Sequence[float]) -> float:
    """Mean squared error."""
    return float(np.mean((np.asarray(gold) - np.asarray(found)) ** 2)) if gold else 0.0


def pearson(gold: Sequence[float], found: Sequence[float]) -> float:
    """Pearson correlation; 0 when one side is constant."""
    return _correlation(np.asarray(gold, dtype=np.float64), np.asarray(found, dtype=np.float64))


def spearman(gold: Sequence[float], found: Sequence[float]) -> float:
    """Spearman correlation, ties sharing their mean rank; 0 when one side is constant."""
    return _correlation(_ranks(gold), _ranks(found))


def _correlation(a: Floats, b: Floats) -> float:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _ranks(values: Sequence[float]) -> Floats:
    _, place, count = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    ranks: Floats = (ends - (count - 1) / 2)[place]
    return ranks


def _confusion(gold: Sequence[str], found: Sequence[str]) -> Floats:
    """Counts [labels, labels], gold down and found across, over the labels that occur."""
    labels, index = np.unique([*gold, *found], return_inverse=True)
    table = np.zeros((len(labels), len(labels)))
    np.add.at(table, (index[: len(gold)], index[len(gold) :]), 1.0)
    return table


RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def points(self) -> str:
        """Signed, as points of a hundred: ``+1.2 [-0.3, +2.6]``."""
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"

    @property
    def is_sure(self) -> bool:
        return self.low > 0 or self.high < 0


Bounds = tuple[float, float]
"""The least and the greatest value that a metric can have."""
SHARE: Bounds = (0.0, 1.0)
CORRELATION: Bounds = (-1.0, 1.0)


def bootstrap(count: int, statistic: Callable[[NDArray[np.int64]], float], bounds: Bounds = SHARE) -> Interval:
    """The percentile interval of a statistic of ``count`` items, which gets the numbers of those drawn (Efron 1979).

    It is moved by as much as resampling itself moves the statistic: a calibration error, say, is larger on items that
    are drawn twice. A difference of two metrics on the same items is a paired bootstrap (Koehn 2004). The interval ends
    where the statistic does, at its ``bounds``: those of a share unless they are given.
    """
    value, found = statistic(np.arange(count)), np.array([statistic(drawn) for drawn in _draws(count)])
    low, high = np.clip(np.percentile(found, (2.5, 97.5)) - (found.mean() - value), *bounds)
    return Interval(value, float(low), float(high))


def _draws(count: int) -> Iterator[NDArray[np.int64]]:
    generator = np.random.default_rng(0)
    return (generator.integers(0, count, count) for _ in range(RESAMPLES))


def mcnemar(first: int, second: int) -> float:
    """The exact two-sided probability of a split at least as uneven, were both right equally often (McNemar 1947)."""
    total, fewer = first + second, min(first, second)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**total))


def paired_effect(differences: Floats) -> float:
    """Cohen's d of paired differences: their mean in units of their standard deviation; 0 where there are none."""
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    return float(differences.mean()) / spread if spread else 0.0


def of_ranking(grades: Floats) -> dict[str, float]:
    """The metrics of one search, as trec_eval has them: ``grades`` [D] of all documents, in the order found.

    nDCG with linear gains, the reciprocal rank of the first that is relevant (a grade above 0) among ten, the mean
    precision at each that is, and the share of those among the first 1, 10 and 100.
    """
    gains, relevant = np.maximum(grades, 0.0), grades > 0
    discount = 1 / np.log2(np.arange(2, 12))[: len(grades)]
    best = float(np.sort(gains)[::-1][:10] @ discount)
    places = np.flatnonzero(relevant) + 1
    return {
        "ndcg@10": ratio(float(gains[:10] @ discount), best),
        "mrr@10": float(1 / places[0]) if len(places) and places[0] <= 10 else 0.0,
        "map": float(np.mean(np.arange(1, len(places) + 1) / places)) if len(places) else 0.0,
        **{f"recall@{k}": ratio(relevant[:k].sum(), relevant.sum()) for k in (1, 10, 100)},
    }


def mean_of(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric."""
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


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
