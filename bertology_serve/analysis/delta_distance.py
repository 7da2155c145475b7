"""How far deltas moved the weights and, on a corpus, the features; and how alike several deltas are."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch

from bertology_serve.analysis.figures import BarChart, Figure, HeatMap, LineChart, Panel
from bertology_serve.analysis.report import AnalysisReport, origin
from bertology_serve.analysis.settings import DistanceSettings
from bertology_serve.analysis.subject_model import (
    Advance,
    DeltaLike,
    EncoderLike,
    Subject,
    data_name,
    read_texts,
    silent,
)
from bertology_serve.analysis.weight_change import Directions, LinearCka, Move, directions_of, moves, overlap
from bertology_serve.data.records import DataLike
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import BaseMismatch, SpecError
from bertology_serve.files import JsonObject
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import Encoding

WIDE = 8  # modules, beyond which heat-maps stand below each other


def distance(
    encoder: EncoderLike = None,
    delta: DeltaLike = None,
    texts: DataLike | None = None,
    settings: DistanceSettings | None = None,
    *,
    advance: Advance = silent,
) -> AnalysisReport:
    """How far ``delta`` moved the weights and, on ``texts`` (as for ``attention``), the features of every layer.

    Tables: ``weights``, a row a tensor that moved, with the Frobenius norm of the change, that beside the base's, and
    its effective rank (Roy and Vetterli 2007); ``spectra``, the singular values of those changes; ``features``, linear
    CKA (Kornblith et al. 2019, arXiv 1905.00414) and drift of each layer's rows, layer 0 the embeddings; all float.

    A delta of whole weights is compared with the base that it names. Raises SpecError without a delta, BaseMismatch
    where the base at hand is not the one that a whole model was tuned from.
    """
    settings = settings or DistanceSettings()
    subject = Subject.of(encoder, delta)
    if subject.delta is None:
        raise SpecError("a distance is that of a delta from its base; give one (--delta DIR)")
    started = time.perf_counter()
    base = base_of(subject)
    length = subject.longest(settings.max_length)
    encodings = read_texts(texts, subject.encoder.tokenizer, length, settings.most)
    (features,), _ = compare_features(base, [subject], encodings, settings.max_tokens, advance)
    weights = base.encoder.model.state_dict()
    anatomy = subject.encoder.anatomy
    with torch.no_grad():
        found = list(moves(subject.delta, anatomy, weights))
    facts = {
        **subject.facts(), "corpus": data_name(texts), "sequences": len(encodings), "tokens": features[0].rows,
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
        raise BaseMismatch(f"{encoder.name} is not the base that {subject.delta.name!r} was tuned from: other hash")
    return Subject(encoder)


def _report(
    subject: Subject, moves: Sequence[Move], features: Sequence[LinearCka], facts: JsonObject
) -> AnalysisReport:
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
    return AnalysisReport("distance", facts, {name: table for name, table in tables.items() if table}, figures)


def _feature_panels(rows: Sequence[JsonObject]) -> list[Panel]:
    layers, label = [row["layer"] for row in rows], "layer (0: embeddings)"
    return [
        LineChart("likeness", layers, {"linear CKA": [row["cka"] for row in rows]}, label, "linear CKA with the base"),
        LineChart("drift", layers, {"drift": [row["drift"] for row in rows]}, label, "mean ‖change‖ / ‖base row‖"),
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


def _spectra(moves: Sequence[Move]) -> LineChart:
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
    return LineChart("mean over layers", numbers, padded, "singular value number", "singular value")


def _mean_spectrum(spectra: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*spectra, strict=False)]


OOD = "ood_"


def compare_deltas(
    deltas: Sequence[Subject | Delta | str | Path],
    texts: DataLike | None = None,
    settings: DistanceSettings | None = None,
    *,
    encoder: EncoderLike = None,
    advance: Advance = silent,
) -> AnalysisReport:
    """Several deltas of one base beside each other: how far each moved it, how alike every two are, what they answer.

    ``encoder`` is the one that all run on, by default what each names.

    Tables: ``deltas``, the distance of each and its metrics (fractions) as training saved them, in and out of domain;
    ``layers``, the distance and linear CKA of each layer; ``pairs``, linear CKA of the last layer's rows on ``texts``
    (as for ``attention``) and overlap of the changed subspaces (Hu et al. 2021, arXiv 2106.09685, eq. 4).

    Raises SpecError for fewer than two deltas, BaseMismatch where they have different bases.
    """
    settings = settings or DistanceSettings()
    subjects = [one if isinstance(one, Subject) else Subject.of(encoder, one) for one in deltas]
    held = [one.delta for one in subjects if one.delta is not None]
    if len(held) < 2 or len(held) != len(subjects):
        raise SpecError(f"got {len(held)} deltas; expected two or more to set beside each other")
    if len({delta.base.sha256 for delta in held}) > 1:
        raise BaseMismatch(f"the deltas have different bases: {', '.join(f'{d.name} {d.base.name}' for d in held)}")
    started, base = time.perf_counter(), base_of(subjects[0])
    length = min(one.longest(settings.max_length) for one in [base, *subjects])
    encodings = read_texts(texts, base.encoder.tokenizer, length, settings.most)
    names = _names(held)
    from_base, pairs = compare_features(base, subjects, encodings, settings.max_tokens, advance)
    weights, anatomy = base.encoder.model.state_dict(), base.encoder.anatomy
    with torch.no_grad():
        moved = [list(moves(delta, anatomy, weights)) for delta in held]
        directions = [directions_of(delta, anatomy, weights) for delta in held]
    facts = {
        **base.facts(), "deltas": names, "corpus": data_name(texts), "sequences": len(encodings),
        "seconds": round(time.perf_counter() - started, 3), **origin(),
    }  # fmt: skip
    tables = {
        "deltas": [_row(*own) for own in zip(names, held, moved, from_base, strict=True)],
        "layers": _layers(names, moved, from_base, anatomy.layers),
        "pairs": _pairs(names, pairs, directions),
    }
    return AnalysisReport("beside", facts, tables, _figures(tables, names, anatomy.layers))


def _names(deltas: Sequence[Delta]) -> list[str]:
    """Names that tell the deltas apart: numbered where two have the same."""
    plain = [delta.name for delta in deltas]
    return [name if plain.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(plain)]


@torch.inference_mode()
def compare_features(
    base: Subject, subjects: Sequence[Subject], encodings: Sequence[Encoding], max_tokens: int, advance: Advance
) -> tuple[list[list[LinearCka]], dict[tuple[int, int], LinearCka]]:
    """Each delta's rows beside the base's, layer by layer; every two deltas' rows of the last layer."""
    anatomy = base.encoder.anatomy
    from_base = [[LinearCka(anatomy.hidden) for _ in range(anatomy.layers + 1)] for _ in subjects]
    pairs = {pair: LinearCka(anatomy.hidden) for pair in combinations(range(len(subjects)), 2)}
    done = 0
    for passed in zip(*(model.passes(encodings, max_tokens) for model in (base, *subjects)), strict=True):
        own, *others = [[hidden[batch.text_rows] for hidden in layers.values()] for _, batch, layers in passed]
        for layers, found in zip(others, from_base, strict=True):
            for cka, x, y in zip(found, own, layers, strict=True):
                cka.add(x, y)
        for (i, j), cka in pairs.items():
            cka.add(others[i][-1], others[j][-1])
        done += len(passed[0][0])
        advance(done, len(encodings))
    return from_base, pairs


def _row(name: str, delta: Delta, moves: Sequence[Move], features: Sequence[LinearCka]) -> JsonObject:
    metric = task_for(delta.task).main_metric
    return {
        "delta": name, "kind": " + ".join(delta.kinds), "metric": metric,
        "in_domain": delta.metrics.get(metric), "out_of_domain": delta.metrics.get(OOD + metric),
        "frobenius": sum(move.frobenius**2 for move in moves) ** 0.5,
        "cka_last": features[-1].value, "drift_last": features[-1].drift,
    }  # fmt: skip


def _layers(
    names: Sequence[str], moves: Sequence[Sequence[Move]], features: Sequence[Sequence[LinearCka]], layers: int
) -> list[JsonObject]:
    """A row a delta and layer; 0 is the embeddings, whose weights are those outside the layers."""
    rows = []
    for name, own, found in zip(names, moves, features, strict=True):
        for number in range(layers + 1):
            inside = [move for move in own if (move.layer is None and number == 0) or move.layer == number - 1]
            norm = sum(move.frobenius**2 for move in inside) ** 0.5
            rows.append({"delta": name, "layer": number, "frobenius": norm, "cka": found[number].value,
                         "drift": found[number].drift})  # fmt: skip
    return rows


def _pairs(
    names: Sequence[str], pairs: Mapping[tuple[int, int], LinearCka],
    directions: Sequence[Mapping[tuple[str, int], Directions]],
) -> list[JsonObject]:  # fmt: skip
    rows = []
    for (i, j), cka in pairs.items():
        both = [key for key in directions[i] if key in directions[j]]
        sides = {
            side: [overlap(getattr(directions[i][key], side), getattr(directions[j][key], side)) for key in both]
            for side in ("left", "right")
        }
        chance = [max(directions[i][key].right.shape[1], directions[j][key].right.shape[1]) /
                  directions[i][key].right.shape[0] for key in both]  # fmt: skip
        means = {side: sum(own) / len(own) if own else None for side, own in {**sides, "chance": chance}.items()}
        rows.append({"first": names[i], "second": names[j], "cka_last": cka.value, "modules": len(both),
                     "overlap_inputs": means["right"], "overlap_outputs": means["left"],
                     "overlap_by_chance": means["chance"]})  # fmt: skip
    return rows


def _figures(tables: Mapping[str, Sequence[JsonObject]], names: Sequence[str], layers: int) -> dict[str, Figure]:
    label = "layer (0: embeddings)"

    def lines(column: str, title: str, unit: str) -> LineChart:
        curves = {name: [row[column] for row in tables["layers"] if row["delta"] == name] for name in names}
        return LineChart(title, list(range(layers + 1)), curves, label, unit)

    panels = [
        lines("frobenius", "weights", "‖change‖ (Frobenius)"),
        lines("drift", "features: drift", "mean ‖change‖ / ‖base row‖"),
        lines("cka", "features: likeness", "linear CKA with the base"),
    ]
    figures = {"layers": Figure("How far each delta moved the base", panels, 2)}
    held = [row for row in tables["deltas"] if row["in_domain"] is not None]
    if held:
        series = {"in domain": [row["in_domain"] for row in held]}
        if any(row["out_of_domain"] is not None for row in held):
            series["out of domain"] = [row["out_of_domain"] for row in held]
        unit = f"{held[0]['metric']} (fraction)"
        figures["metrics"] = Figure("What they answer", [BarChart("", [row["delta"] for row in held], series, unit)])
    shown = [("cka_last", "likeness of the last layers", "linear CKA"),
             ("overlap_inputs", "directions that are read", "subspace overlap"),
             ("overlap_outputs", "directions that are written", "subspace overlap")]  # fmt: skip
    maps = [
        _matrix(tables["pairs"], names, *one)
        for one in shown
        if any(row[one[0]] is not None for row in tables["pairs"])
    ]
    figures["pairs"] = Figure("Every two deltas", maps, 3)
    return figures


def _matrix(rows: Sequence[JsonObject], names: Sequence[str], column: str, title: str, unit: str) -> HeatMap:
    cells = {(row["first"], row["second"]): row[column] for row in rows}
    values = [[1.0 if a == b else cells.get((a, b), cells.get((b, a))) for b in names] for a in names]
    return HeatMap(title, values, "", "", unit, (0.0, 1.0), names, names)
