"""``analyze attention``: what each head attends to on a corpus, and which heads attend alike."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertology_serve.analysis.corpus import Corpus, corpus_name, read_corpus
from bertology_serve.analysis.dependencies import dependencies as follow
from bertology_serve.analysis.figures import Figure, HeatMap, Scatter
from bertology_serve.analysis.head_statistics import (
    STATISTICS,
    TITLES,
    UNITS,
    Divergences,
    HeadStatistics,
    TextMaps,
    clusters,
    flat_map,
)
from bertology_serve.analysis.report import Report, origin
from bertology_serve.analysis.settings import AttentionSettings
from bertology_serve.analysis.subject_model import Advance, Subject, batches, head_numbers, mapped, silent
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.tasks.encoding import encode_text
from bertology_serve.tasks.spec import Encoding


def attention(
    backbone: str | Encoder | Subject | None = "minilm",
    corpus: Corpus = None,
    settings: AttentionSettings | None = None,
    *,
    delta: Delta | str | Path | None = None,
    dependencies: str | Path | None = None,
    sentences: Sequence[str] = (),
    advance: Advance = silent,
) -> Report:
    """The statistics of every head (see ``head_statistics``) over a corpus, one pass, memory bounded by a batch.

    With ``dependencies``, a CoNLL-U file or ``example`` (the built-in sentences), also how well heads follow them;
    with ``sentences`` the maps of every head for each.

    Divergences between heads are measured on whole sequences spread over the corpus, about ``js_rows`` rows of them.
    Raises Unsupported for encoders that keep their own attention.
    """
    subject, settings = Subject.of(backbone, delta), settings or AttentionSettings()
    encoder = subject.encoder
    length = min(settings.max_length, encoder.max_tokens - subject.virtual)
    encodings = read_corpus(corpus, encoder.tokenizer, length, settings.most)
    started = time.perf_counter()
    statistics, divergences = _gather(subject, encodings, settings, advance)
    facts = {
        **subject.facts(), "corpus": corpus_name(corpus), "sequences": len(encodings), "tokens": statistics.rows,
        "divergence_rows": divergences.rows, "seconds": round(time.perf_counter() - started, 3), **origin(),
    }  # fmt: skip
    report = _report(subject, statistics.means().tolist(), divergences.means(), settings.clusters, facts)
    return _more(report, subject, length, settings, dependencies, sentences)


def _more(
    report: Report, subject: Subject, length: int, settings: AttentionSettings, path: str | Path | None,
    sentences: Sequence[str],
) -> Report:  # fmt: skip
    """The report with dependencies and the maps of single sentences."""
    facts, tables, figures = dict(report.facts), dict(report.tables), dict(report.figures)
    if path is not None:
        found = follow(subject, path, length, settings.max_tokens, settings.fewest_arcs)
        facts, tables = facts | found.facts, tables | found.tables
        figures["dependencies"] = found.figure
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(sentences, 1):
        maps, own = sentence_maps(subject, text, number)
        figures, rows = figures | maps, rows + own
    return Report(report.name, facts, tables | ({"maps": rows} if rows else {}), figures)


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


def _report(subject: Subject, means: Any, apart: np.ndarray, count: int, facts: dict[str, Any]) -> Report:
    heads = len(means[0])
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
            mapped(torch.tensor(means, dtype=torch.float64)[..., n], numbers),
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
    return Report("attention", facts, {"heads": table, "divergences": pairs}, figures)


LONGEST = 48


@torch.inference_mode()
def sentence_maps(subject: Subject, text: str, number: int) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """A figure a layer with a map a head, and the rows of a table; a text is cut to 48 tokens."""
    tokenizer = subject.encoder.tokenizer
    encoding = encode_text(tokenizer, text, None, min(LONGEST, subject.encoder.max_tokens - subject.virtual))
    batch = subject.pack([encoding])
    watch = TextMaps(batch)
    subject.run(batch, watch)
    names = tokenizer.convert_ids_to_tokens(list(encoding.ids))
    figures, rows = {}, []
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
    return figures, rows
