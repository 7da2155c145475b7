"""``analyze distance``: how far a delta moved the weights and, on a corpus, the features."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bertology_serve.analysis.corpus import Corpus, corpus_name, read_corpus
from bertology_serve.analysis.figures import Figure, HeatMap, Lines, Panel
from bertology_serve.analysis.report import Report, origin
from bertology_serve.analysis.representations import LinearCka
from bertology_serve.analysis.settings import DistanceSettings
from bertology_serve.analysis.subject_model import Advance, Subject, silent
from bertology_serve.analysis.weight_change import Move, moves_between, moves_of
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import BaseMismatch, SpecError
from bertology_serve.tasks.spec import Encoding

WIDE = 8  # modules, beyond which heat-maps stand below each other


def distance(
    backbone: str | Encoder | Subject | None = None,
    delta: Delta | str | Path | None = None,
    corpus: Corpus = None,
    settings: DistanceSettings | None = None,
    *,
    advance: Advance = silent,
) -> Report:
    """Norms of the change per layer and module, spectra of updates, and features beside the base's on a corpus.

    A delta of whole weights is compared with the base that it names. Raises SpecError without a delta, BaseMismatch
    where the base at hand is not the one that a whole model was tuned from.
    """
    settings = settings or DistanceSettings()
    subject = Subject.of(backbone, delta)
    if subject.delta is None:
        raise SpecError("a distance is that of a delta from its base; give one (--delta DIR)")
    started = time.perf_counter()
    base = base_of(subject)
    length = min(settings.max_length, subject.encoder.max_tokens - subject.virtual)
    encodings = read_corpus(corpus, subject.encoder.tokenizer, length, settings.most)
    features = compare_features(base, subject, encodings, settings.max_tokens, advance)
    weights = base.encoder.model.state_dict()
    anatomy = subject.encoder.anatomy
    with torch.no_grad():
        found = list(
            moves_between(subject.delta.weights, anatomy, weights)
            if subject.delta.weights
            else moves_of(subject.delta.effects(anatomy), anatomy, weights)
        )
    facts = {
        **subject.facts(), "corpus": corpus_name(corpus), "sequences": len(encodings), "tokens": features[0].rows,
        "moved_tensors": len(found), "seconds": round(time.perf_counter() - started, 3), **origin(),
    }  # fmt: skip
    return _report(subject, found, features, facts)


def base_of(subject: Subject) -> Subject:
    """The encoder without the delta."""
    assert subject.delta is not None
    if not subject.delta.weights:
        return Subject(subject.encoder)
    encoder = Encoder.load(subject.delta.base.name, device=str(subject.encoder.device))
    if encoder.ref.sha256 != subject.delta.base.sha256:
        raise BaseMismatch(
            f"{encoder.name} is not the base that {subject.delta.name!r} was tuned from; its hash differs"
        )
    return Subject(encoder)


@torch.inference_mode()
def compare_features(
    base: Subject, subject: Subject, encodings: Sequence[Encoding], max_tokens: int, advance: Advance = silent
) -> list[LinearCka]:
    """CKA of all text rows, the embeddings' first and then each layer's."""
    anatomy = subject.encoder.anatomy
    found = [LinearCka(anatomy.hidden) for _ in range(anatomy.layers + 1)]
    done = 0
    for passed in zip(*(model.passes(encodings, max_tokens) for model in (base, subject)), strict=True):
        sides = [[hidden[batch.text_rows] for hidden in layers.values()] for _, batch, layers in passed]
        for cka, x, y in zip(found, *sides, strict=True):
            cka.add(x, y)
        done += len(passed[0][0])
        advance(done, len(encodings))
    return found


def _report(subject: Subject, moves: Sequence[Move], features: Sequence[LinearCka], facts: dict[str, Any]) -> Report:
    spectra = [
        {"slot": move.slot, "layer": move.layer, "part": move.part, "index": n, "value": value}
        for move in moves for n, value in enumerate(move.singular)
    ]  # fmt: skip
    rows = [{"layer": layer, "cka": one.value, "drift": one.drift} for layer, one in enumerate(features)]
    facts = {**facts, "frobenius": sum(move.frobenius**2 for move in moves) ** 0.5}
    figures = {"features": Figure(f"Features beside the base's: {subject.name}", _feature_panels(rows), 2)}
    inside = [move for move in moves if move.layer is not None]
    if inside:
        panels = _weight_panels(inside, subject.encoder.anatomy.layers)
        wide = len(set(map(_name, inside))) > WIDE
        figures["weights"] = Figure(f"How far the weights moved: {subject.name}", panels, 1 if wide else 3)
    if any(move.singular for move in inside):
        figures["spectra"] = Figure(f"Singular values of the change: {subject.name}", [_spectra(inside)])
    tables = {"weights": [move.as_row() for move in moves], "spectra": spectra, "features": rows}
    return Report("distance", facts, {name: table for name, table in tables.items() if table}, figures)


def _feature_panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    layers, label = [row["layer"] for row in rows], "layer (0: embeddings)"
    return [
        Lines("likeness", layers, {"linear CKA": [row["cka"] for row in rows]}, label, "linear CKA with the base"),
        Lines("drift", layers, {"drift": [row["drift"] for row in rows]}, label, "mean ‖change‖ / ‖base row‖"),
    ]


def _name(move: Move) -> str:
    return f"{move.slot} {move.part}"


def _weight_panels(moves: Sequence[Move], layers: int) -> list[Panel]:
    """Layer by module, each where there is something to show: relative change, its norm, its effective rank."""
    names = list(dict.fromkeys(map(_name, moves)))
    panels: list[Panel] = []
    for title, unit, attribute in (
        ("beside the base's norm", "‖change‖ / ‖base‖", "relative"),
        ("norm", "‖change‖ (Frobenius)", "frobenius"),
        ("effective rank", "effective rank", "effective_rank"),
    ):
        cells = {(move.layer, _name(move)): getattr(move, attribute) for move in moves}
        kept = [name for name in names if any(cells.get((layer, name)) is not None for layer in range(layers))]
        if kept:
            values = [[cells.get((layer, name)) for name in kept] for layer in range(layers)]
            panels.append(HeatMap(title, values, "layer", "module", unit, column_names=kept))
    return panels


def _spectra(moves: Sequence[Move]) -> Lines:
    """The singular values of each module's change, averaged over the layers."""
    spectra: dict[str, list[Sequence[float]]] = {}
    for move in moves:
        if move.singular:
            spectra.setdefault(_name(move), []).append(move.singular)
    curves = {name: _mean_spectrum(own) for name, own in spectra.items()}
    longest = max(map(len, curves.values()))
    padded: dict[str, list[float | None]] = {
        name: [*own, *[None] * (longest - len(own))] for name, own in curves.items()
    }
    numbers = [float(number) for number in range(1, longest + 1)]
    return Lines("mean over layers", numbers, padded, "singular value number", "singular value")


def _mean_spectrum(spectra: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*spectra, strict=False)]
