"""Hard negatives: for each text of a pair the nearest others, of all that belongs to some text of the set or a corpus.

As sentence-transformers' ``mine_hard_negatives`` finds them. Imports no torch until it is at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bertology_serve.config_fields import check_fields, option
from bertology_serve.errors import SpecError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bertology_serve.tasks.embedding import EmbeddingExample

    Vectors = NDArray[np.float32]

ROWS = 256


@dataclass(frozen=True)
class Mining:
    """Which texts are taken for negatives, by the cosine with the anchor and with what is known to belong to it."""

    negatives: int = option(3, "Negatives for each pair.", least=1)
    range_min: int = option(0, "Pass over so many of the nearest: they may belong to the text after all.", least=0)
    range_max: int = option(100, "Look no further than so many of the nearest.")
    margin: float | None = option(None, "A negative's cosine is at least so much below the positive's.")
    relative_margin: float | None = option(None, "The same as a share of the positive's: 0.05 for at most 95 % of it.")
    max_score: float | None = option(None, "Highest cosine of a negative.")
    sampling: Literal["top", "random"] = option("top", "Of those that are left: the nearest, or any.")
    seed: int = option(0, "Decides what is drawn at random.")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.range_min >= self.range_max:
            raise SpecError(f"ranks from {self.range_min} to {self.range_max} are none; raise range_max")


def mine(
    examples: Sequence[EmbeddingExample],
    corpus: Sequence[str],
    settings: Mining,
    embed: Callable[[Sequence[str], str], Vectors],
) -> Iterator[tuple[EmbeddingExample, list[str]]]:
    """Each pair with its negatives, the nearest first: fewer, or none, where no more fit.

    ``embed`` gives the vectors [N, H], of unit length, of texts that are each a "document" or a "query". ``corpus``
    holds further texts to find negatives among. What belongs to the same text in any pair is none of its negatives.
    """
    import numpy as np

    documents = list(dict.fromkeys([*(str(one.text_pair) for one in examples), *corpus]))
    anchors = list(dict.fromkeys(one.text for one in examples))
    places = {text: place for place, text in enumerate(documents)}
    own = {text: {places[text]} if text in places else set() for text in anchors}
    for one in examples:
        own[one.text].add(places[str(one.text_pair)])
    rows = {text: row for row, text in enumerate(anchors)}
    table, asked = embed(documents, "document"), embed(anchors, "query")
    generator = np.random.default_rng(settings.seed)
    for first in range(0, len(examples), ROWS):
        part = examples[first : first + ROWS]
        scores = asked[[rows[one.text] for one in part]] @ table.T
        for one, cosines in zip(part, scores, strict=True):
            chosen = _chosen(cosines, own[one.text], places[str(one.text_pair)], settings, generator)
            yield one, [documents[i] for i in chosen]


def _chosen(
    cosines: Vectors, own: set[int], positive: int, settings: Mining, generator: np.random.Generator
) -> list[int]:
    import numpy as np

    count = min(len(cosines), settings.range_max + len(own))
    nearest = np.argpartition(-cosines, count - 1)[:count]
    ranked = [int(i) for i in nearest[np.argsort(-cosines[nearest], kind="stable")] if int(i) not in own]
    most = min(
        np.inf if settings.max_score is None else settings.max_score,
        np.inf if settings.margin is None else cosines[positive] - settings.margin,
        np.inf if settings.relative_margin is None else cosines[positive] * (1 - settings.relative_margin),
    )
    left = [i for i in ranked[settings.range_min : settings.range_max] if cosines[i] <= most]
    if settings.sampling == "random" and len(left) > settings.negatives:
        left = [left[i] for i in sorted(generator.choice(len(left), settings.negatives, replace=False))]
    return left[: settings.negatives]
