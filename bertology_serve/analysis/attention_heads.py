"""What each head attends to on a corpus, which heads attend alike, and how well heads follow dependencies."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertology_serve import examples
from bertology_serve.analysis.figures import BarChart, Figure, HeatMap, Scatter
from bertology_serve.analysis.head_statistics import (
    STATISTICS,
    TITLES,
    UNITS,
    Divergences,
    HeadStatistics,
    TextMaps,
    by_words,
    clusters,
    flat_map,
)
from bertology_serve.analysis.report import AnalysisReport, origin
from bertology_serve.analysis.settings import AttentionSettings
from bertology_serve.analysis.subject_model import (
    Advance,
    DeltaLike,
    EncoderLike,
    Subject,
    batches,
    data_name,
    head_numbers,
    mapped,
    read_texts,
    silent,
)
from bertology_serve.data.records import DataLike, Record, read_records
from bertology_serve.errors import DataError
from bertology_serve.files import JsonObject
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.encoding import encode_text, encode_words
from bertology_serve.tasks.spec import Encoding
from bertology_serve.tasks.token_classification import join_words


def attention(
    encoder: EncoderLike = "minilm",
    texts: DataLike | None = None,
    settings: AttentionSettings | None = None,
    *,
    delta: DeltaLike = None,
    dependencies: DataLike | None = None,
    sentences: Sequence[str] = (),
    advance: Advance = silent,
) -> AnalysisReport:
    """What every head attends to on ``texts`` (Clark et al. 2019, arXiv 1906.04341), in one pass, and who is alike.

    ``encoder`` is a name, a directory or an ``Encoder``; ``delta``, if any, is applied to every sequence. ``texts`` are
    a ``.txt`` with a line each, a list of texts, or records as for training; by default the built-in ones.

    Tables: ``heads``, a row a head with the statistics that ``head_statistics`` defines (entropy in bits, distance in
    tokens, the others shares) and its cluster; ``divergences``, Jensen-Shannon in bits of every two heads, over about
    ``settings.js_rows`` rows of whole sequences. With ``dependencies`` also the tables of ``analysis.dependencies``,
    with ``sentences`` those of ``analysis.attention_maps``.

    Raises Unsupported for encoders that keep their own attention, DataError for records without a text.
    """
    subject, settings = Subject.of(encoder, delta), settings or AttentionSettings()
    tokenizer = subject.encoder.tokenizer
    encodings = read_texts(texts, tokenizer, subject.longest(settings.max_length), settings.most)
    started = time.perf_counter()
    statistics, divergences = _gather(subject, encodings, settings, advance)
    facts = {
        **subject.facts(), "corpus": data_name(texts), "sequences": len(encodings), "tokens": statistics.rows,
        "divergence_rows": divergences.rows, "seconds": round(time.perf_counter() - started, 3), **origin(),
    }  # fmt: skip
    report = _report(subject, statistics.means(), divergences.means(), settings.clusters, facts)
    more = [] if dependencies is None else [_follow(subject, dependencies, settings)]
    for other in [*more, *([attention_maps(subject, sentences)] if sentences else [])]:
        report = replace(
            report,
            facts=report.facts | other.facts,
            tables={**report.tables, **other.tables},
            figures={**report.figures, **other.figures},
        )
    return report


@torch.inference_mode()
def _gather(
    subject: Subject, encodings: Sequence[Encoding], settings: AttentionSettings, advance: Advance
) -> tuple[HeadStatistics, Divergences]:
    encoder, anatomy = subject.encoder, subject.encoder.anatomy
    special = (encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id)
    statistics = HeadStatistics(anatomy.layers, anatomy.heads, *special)
    divergences = Divergences(len(head_numbers(anatomy)))
    lengths = [len(encoding) for encoding in encodings]
    every = max(1, math.ceil(sum(lengths) / settings.js_rows))
    done = 0
    for members in batches(lengths, settings.max_tokens):
        batch = subject.pack([encodings[i] for i in members])
        chosen = frozenset(s for s, original in enumerate(batch.order) if members[original] % every == 0)
        statistics.begin(batch, chosen)
        subject.run(batch, statistics)
        for maps in statistics.kept.values():
            divergences.add(maps)
        done += len(members)
        advance(done, len(encodings))
    return statistics, divergences


def _report(subject: Subject, found: Tensor, apart: np.ndarray, count: int, facts: JsonObject) -> AnalysisReport:
    heads, means = found.shape[1], found.tolist()
    numbers = head_numbers(subject.encoder.anatomy)
    virtual = max(value[-1] for layer in means for value in layer) > 1e-4
    shown = STATISTICS if virtual else STATISTICS[:-1]
    groups, points = clusters(apart, count), flat_map(apart)
    names = [f"layer {n // heads} head {n % heads}" for n in numbers]
    table = [
        {"layer": n // heads, "head": n % heads, "cluster": groups[place] + 1,
         **dict(zip(shown, means[n // heads][n % heads], strict=False))}
        for place, n in enumerate(numbers)
    ]  # fmt: skip
    pairs = [
        {"first": names[i], "second": names[j], "divergence": float(apart[i, j])}
        for i in range(len(names)) for j in range(i + 1, len(names))
    ]  # fmt: skip
    panels = [
        HeatMap(
            TITLES[statistic],
            mapped(found[..., n], numbers),
            "layer",
            "head",
            UNITS[statistic],
        )
        for n, statistic in enumerate(shown)
    ]
    scatter = Scatter("", points[:, 0].tolist(), points[:, 1].tolist(), names, groups,
                      "first coordinate (bits)", "second coordinate (bits)")  # fmt: skip
    figures = {
        "heads": Figure(f"What heads attend to: {subject.name}", panels, 4),
        "clusters": Figure(f"Heads by Jensen-Shannon divergence: {subject.name}", [scatter]),
    }
    return AnalysisReport("attention", facts, {"heads": table, "divergences": pairs}, figures)


LONGEST = 48


@torch.inference_mode()
def attention_maps(encoder: EncoderLike, sentences: Sequence[str], *, delta: DeltaLike = None) -> AnalysisReport:
    """Every head's attention from each token to each, for single sentences, each cut to 48 tokens.

    Table ``maps``: a row a sentence, layer, head and token, with the share of its attention (it sums to 1 but for what
    goes to virtual rows) on every token of the sentence. Figures: one a sentence and layer, a map a head.

    Raises Unsupported for encoders that keep their own attention.
    """
    subject = Subject.of(encoder, delta)
    tokenizer = subject.encoder.tokenizer
    figures: dict[str, Figure] = {}
    rows: list[JsonObject] = []
    for number, text in enumerate(sentences, 1):
        encoding = encode_text(tokenizer, text, None, subject.longest(LONGEST))
        batch = subject.pack([encoding])
        watch = TextMaps(batch)
        subject.run(batch, watch)
        names = tokenizer.convert_ids_to_tokens(list(encoding.ids))
        for layer, maps in enumerate(watch.maps[0]):
            panels = [
                HeatMap(f"layer {layer}, head {head}", own, "from", "to", "attention", (0.0, 1.0), names, names)
                for head, own in enumerate(maps.double().tolist())
            ]
            figures[f"text{number}-layer{layer}"] = Figure(f"“{text[:80]}”, layer {layer}: {subject.name}", panels, 3)
            rows += [
                {"text": number, "layer": layer, "head": head, "from": names[i], "row": i,
                 **{f"{j} {name}": value for j, (name, value) in enumerate(zip(names, line, strict=True))}}
                for head, own in enumerate(maps.tolist()) for i, line in enumerate(own)
            ]  # fmt: skip
    return AnalysisReport("maps", {**subject.facts(), **origin()}, {"maps": rows}, figures)


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


def _is_example(trees: DataLike) -> bool:
    return isinstance(trees, str) and trees == EXAMPLE


def read_sentences(trees: DataLike, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Sentence]:
    """Sentences of a CoNLL-U file, or of any records with ``tokens``, ``heads`` and ``relations``; DataError."""
    records = read_records(examples.trees() if _is_example(trees) else trees)
    return [_sentence(record, tokenizer, max_length) for record in records]


def _sentence(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sentence:
    fields, where = record
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


def _count(right: dict[str, np.ndarray], layer: int, attention: Tensor, sentence: Sentence, anatomy: Anatomy) -> None:
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


def dependencies(
    encoder: EncoderLike = "minilm",
    trees: DataLike = EXAMPLE,
    settings: AttentionSettings | None = None,
    *,
    delta: DeltaLike = None,
) -> AnalysisReport:
    """How well heads follow dependencies (Clark et al. 2019, section 4.2), against the best fixed offset.

    A head's guess for the word that word i depends on is, in one direction, the other word that i attends to most
    (``to``), in the other the word that attends to i most (``from``). A fixed offset guesses the word k places away,
    for every k from -10 to 10. Accuracy is the fraction of a relation's words guessed right; roots and punctuation are
    left out. ``trees`` are a CoNLL-U file, records with ``tokens``, ``heads`` and ``relations``, or ``example``.

    Tables: ``relations``, the best head of each relation that has ``settings.fewest_arcs``; ``best_relations``, the
    relation by which each head beats the offset most. Raises DataError for records without a tree, Unsupported for
    encoders that keep their own attention.
    """
    return _follow(Subject.of(encoder, delta), trees, settings or AttentionSettings())


def _follow(subject: Subject, trees: DataLike, settings: AttentionSettings) -> AnalysisReport:
    sentences = read_sentences(trees, subject.encoder.tokenizer, subject.longest(settings.max_length))
    best = offsets(sentences)
    if not best:
        raise DataError(f"{data_name(trees)}: no dependencies between words; expected parsed sentences")
    right = guesses(subject, sentences, settings.max_tokens)
    shares = {name: table / best[name][2] for name, table in right.items()}
    numbers = head_numbers(subject.encoder.anatomy)
    enough = (name for name in best if name != ALL and best[name][2] >= settings.fewest_arcs)
    names = sorted(enough, key=lambda n: -best[n][2])
    relations = [_best_head(name, shares[name], best[name]) for name in [ALL, *names]]
    heads = [_best_relation(n, {name: shares[name] for name in names}, best) for n in numbers] if names else []
    facts = {**subject.facts(), "dependencies": "built-in example" if _is_example(trees) else data_name(trees),
             "parsed_sentences": len(sentences), "arcs": best[ALL][2], **origin()}  # fmt: skip
    tables = {"relations": relations, "best_relations": heads}
    return AnalysisReport("dependencies", facts, tables, {"dependencies": _figure(subject, shares, relations)})


def _best_head(name: str, shares: np.ndarray, best: tuple[int, float, int]) -> JsonObject:
    layer, head, way = np.unravel_index(int(shares.argmax()), shares.shape)
    accuracy = float(shares.max())
    return {
        "relation": name, "arcs": best[2], "layer": int(layer), "head": int(head), "direction": DIRECTIONS[way],
        "accuracy": accuracy, "offset": best[0], "offset_accuracy": best[1], "gain": accuracy - best[1],
    }  # fmt: skip


def _best_relation(number: int, shares: Mapping[str, np.ndarray], best: JsonObject) -> JsonObject:
    """The relation by which a head beats the best offset most."""
    found = []
    for name, table in shares.items():
        own = table.reshape(-1, 2)[number]
        found.append((float(own.max()) - best[name][1], name, DIRECTIONS[int(own.argmax())], float(own.max())))
    gain, name, way, accuracy = max(found)
    heads = next(iter(shares.values())).shape[1]
    return {"layer": number // heads, "head": number % heads, "relation": name, "direction": way,
            "accuracy": accuracy, "offset_accuracy": best[name][1], "gain": gain}  # fmt: skip


def _figure(subject: Subject, shares: Mapping[str, np.ndarray], relations: Sequence[JsonObject]) -> Figure:
    bars = BarChart(
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
