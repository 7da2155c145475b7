"""How well heads follow dependencies (Clark et al. 2019, section 4.2), against the best fixed offset.

A head's guess for the word that word i depends on is, in one direction, the other word that i attends to most (``to``),
in the other the word that attends to i most (``from``). A fixed offset guesses the word k places away, for every k
from -10 to 10. Accuracy is the share of words of a relation guessed right; roots and punctuation are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertology_serve import examples
from bertology_serve.analysis.figures import Bars, Figure, HeatMap
from bertology_serve.analysis.head_statistics import TextMaps, by_words
from bertology_serve.analysis.subject_model import Subject, batches, head_numbers, mapped
from bertology_serve.data.records import read_records
from bertology_serve.errors import DataError
from bertology_serve.tasks.encoding import encode_words
from bertology_serve.tasks.spec import Encoding
from bertology_serve.tasks.token_classification import join_words

EXAMPLE = "example"
OFFSETS = tuple(k for k in range(-10, 11) if k)
DIRECTIONS = ("to", "from")
LEFT_OUT = ("root", "punct")
ALL = "all"


@dataclass(frozen=True)
class Sentence:
    """A parsed sentence as its encoding has it: words that the length cut off are gone."""

    encoding: Encoding
    words: tuple[int, ...]
    arcs: tuple[tuple[int, int, str], ...]

    @property
    def count(self) -> int:
        """How many words are left."""
        return max(self.words, default=-1) + 1


def read_sentences(path: str | Path, tokenizer: Any, max_length: int, most: int | None) -> list[Sentence]:
    """Sentences of a CoNLL-U file, or of any records with ``tokens``, ``heads`` and ``relations``; DataError."""
    records = read_records(examples.trees() if path == EXAMPLE else path)[:most]
    return [_sentence(record.fields, record.where, tokenizer, max_length) for record in records]


def _sentence(fields: Mapping[str, Any], where: str, tokenizer: Any, max_length: int) -> Sentence:
    if not all(isinstance(fields.get(name), list) for name in ("tokens", "heads", "relations")):
        raise DataError(f"{where}: no parsed sentence; expected CoNLL-U, or fields tokens, heads and relations")
    words = [str(word) for word in fields["tokens"]]
    _, spans = join_words(tuple(words))
    encoding = encode_words(tokenizer, words, [start for start, _ in spans], max_length)
    own = tuple(encoding.words)
    count = max(own, default=-1) + 1
    arcs = [(i, head - 1, relation) for i, (head, relation) in enumerate(zip(fields["heads"], fields["relations"],
                                                                            strict=True))]  # fmt: skip
    inside = [(i, j, relation) for i, j, relation in arcs if relation not in LEFT_OUT and i < count and 0 <= j < count]
    return Sentence(encoding, own, tuple(inside))


@torch.inference_mode()
def guesses(subject: Subject, sentences: Sequence[Sentence], max_tokens: int) -> dict[str, np.ndarray]:
    """For every relation how often each head is right: [L, heads, 2 directions], and ``all``; one pass."""
    anatomy = subject.encoder.anatomy
    right: dict[str, np.ndarray] = {}
    for members in batches([len(sentence.encoding) for sentence in sentences], max_tokens):
        batch = subject.pack([sentences[i].encoding for i in members])
        watch = TextMaps(batch)
        subject.run(batch, watch)
        for packed, original in enumerate(batch.order):
            sentence = sentences[members[original]]
            for layer, attention in enumerate(watch.maps[packed]):
                if sentence.count > 1 and sentence.arcs:
                    _count(right, layer, by_words(attention, sentence.words), sentence, anatomy)
    return right


def _count(right: dict[str, np.ndarray], layer: int, attention: torch.Tensor, sentence: Sentence, anatomy: Any) -> None:
    apart = attention.diagonal_scatter(attention.new_full(attention.shape[:-1], -1.0), 0, -2, -1)
    best = torch.stack([apart.argmax(-1), apart.argmax(-2)], -1).cpu().numpy()  # [heads, W, 2]
    for i, j, relation in sentence.arcs:
        hit = best[:, i] == j
        for name in (relation, ALL):
            table = right.setdefault(name, np.zeros((anatomy.layers, anatomy.heads, 2)))
            table[layer, : len(hit)] += hit


def offsets(sentences: Sequence[Sentence]) -> dict[str, tuple[int, float, int]]:
    """For every relation its best fixed offset, the accuracy of that, and the number of arcs."""
    apart: dict[str, Counter[int]] = {}
    for sentence in sentences:
        for i, j, relation in sentence.arcs:
            for name in (relation, ALL):
                apart.setdefault(name, Counter())[j - i] += 1
    found = {}
    for name, counts in apart.items():
        best = max(OFFSETS, key=lambda k, own=counts: (own[k], -abs(k)))  # type: ignore[misc]
        found[name] = (best, counts[best] / counts.total(), counts.total())
    return found


@dataclass(frozen=True)
class Dependencies:
    """Tables, figure and facts for the report."""

    tables: dict[str, list[dict[str, Any]]]
    figure: Figure
    facts: dict[str, Any]


def dependencies(subject: Subject, path: str | Path, max_length: int, max_tokens: int, fewest: int) -> Dependencies:
    """Each relation's best head and each head's best relation, of those with at least ``fewest`` arcs."""
    sentences = read_sentences(path, subject.encoder.tokenizer, max_length, None)
    best = offsets(sentences)
    if not best:
        raise DataError(f"{path}: no dependencies between words; expected parsed sentences")
    right = guesses(subject, sentences, max_tokens)
    shares = {name: table / best[name][2] for name, table in right.items()}
    numbers = head_numbers(subject.encoder.anatomy)
    names = sorted((n for n in best if n != ALL and best[n][2] >= fewest), key=lambda n: -best[n][2])
    relations = [_best_head(name, shares[name], best[name]) for name in [ALL, *names]]
    heads = [_best_relation(n, {name: shares[name] for name in names}, best) for n in numbers] if names else []
    facts = {"dependencies": "built-in example" if path == EXAMPLE else str(path),
             "parsed_sentences": len(sentences), "arcs": best[ALL][2]}  # fmt: skip
    return Dependencies({"relations": relations, "best_relations": heads}, _figure(subject, shares, relations), facts)


def _best_head(name: str, shares: np.ndarray, best: tuple[int, float, int]) -> dict[str, Any]:
    layer, head, way = np.unravel_index(int(shares.argmax()), shares.shape)
    accuracy = float(shares.max())
    return {
        "relation": name, "arcs": best[2], "layer": int(layer), "head": int(head), "direction": DIRECTIONS[way],
        "accuracy": accuracy, "offset": best[0], "offset_accuracy": best[1], "gain": accuracy - best[1],
    }  # fmt: skip


def _best_relation(number: int, shares: Mapping[str, np.ndarray], best: Mapping[str, Any]) -> dict[str, Any]:
    """The relation by which a head beats the best offset most."""
    found = []
    for name, table in shares.items():
        own = table.reshape(-1, 2)[number]
        found.append((float(own.max()) - best[name][1], name, DIRECTIONS[int(own.argmax())], float(own.max())))
    gain, name, way, accuracy = max(found)
    heads = next(iter(shares.values())).shape[1]
    return {"layer": number // heads, "head": number % heads, "relation": name, "direction": way,
            "accuracy": accuracy, "offset_accuracy": best[name][1], "gain": gain}  # fmt: skip


def _figure(subject: Subject, shares: Mapping[str, np.ndarray], relations: Sequence[Mapping[str, Any]]) -> Figure:
    bars = Bars(
        "the best head of each relation",
        [f"{row['relation']} ({row['arcs']}): layer {row['layer']} head {row['head']}" for row in relations],
        {"best head": [row["accuracy"] for row in relations],
         "best fixed offset": [row["offset_accuracy"] for row in relations]},
        "words guessed right (fraction)",
    )  # fmt: skip
    every = torch.from_numpy(shares[ALL].max(-1))
    heat = HeatMap("all relations, the better direction", mapped(every, head_numbers(subject.encoder.anatomy)),
                   "layer", "head", "words guessed right (fraction)")  # fmt: skip
    return Figure(f"Heads and dependencies: {subject.name}", [bars, heat], 2)
