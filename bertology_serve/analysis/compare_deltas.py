"""Several deltas of one base beside each other: how far each moved it, how alike they are, and what they answer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from bertology_serve.analysis.corpus import Corpus, corpus_name, read_corpus
from bertology_serve.analysis.distance import base_of
from bertology_serve.analysis.figures import Bars, Figure, HeatMap, Lines
from bertology_serve.analysis.report import Report, origin
from bertology_serve.analysis.representations import LinearCka
from bertology_serve.analysis.settings import DistanceSettings
from bertology_serve.analysis.subject_model import Advance, Subject, silent
from bertology_serve.analysis.weight_change import Directions, Move, directions_of, moves_between, moves_of, overlap
from bertology_serve.deltas.delta import Delta
from bertology_serve.errors import BaseMismatch, SpecError
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import Encoding

OOD = "ood_"


def beside(
    subjects: Sequence[Subject | Delta | str | Path],
    corpus: Corpus = None,
    settings: DistanceSettings | None = None,
    *,
    advance: Advance = silent,
) -> Report:
    """Every delta's distance from the base per layer, its metrics, and linear CKA and subspace overlap of every two.

    Metrics are those that training saved, in domain and (``ood_...``) out of it. Raises SpecError for fewer than two
    deltas, BaseMismatch where they have different bases.
    """
    settings = settings or DistanceSettings()
    all_ = [one if isinstance(one, Subject) else Subject.of(None, one) for one in subjects]
    deltas = [one.delta for one in all_ if one.delta is not None]
    if len(deltas) < 2 or len(deltas) != len(all_):
        raise SpecError(f"got {len(deltas)} deltas; expected two or more to set beside each other")
    if len({delta.base.sha256 for delta in deltas}) > 1:
        raise BaseMismatch(f"the deltas have different bases: {', '.join(f'{d.name} {d.base.name}' for d in deltas)}")
    started, base = time.perf_counter(), base_of(all_[0])
    length = min(settings.max_length, base.encoder.max_tokens - max(one.virtual for one in all_))
    encodings = read_corpus(corpus, base.encoder.tokenizer, length, settings.most)
    names = _names(deltas)
    from_base, pairs = _features(base, all_, encodings, settings.max_tokens, advance)
    weights, anatomy = base.encoder.model.state_dict(), base.encoder.anatomy
    with torch.no_grad():
        moves = [list(moves_between(delta.weights, anatomy, weights) if delta.weights else
                      moves_of(delta.effects(anatomy), anatomy, weights)) for delta in deltas]  # fmt: skip
        directions = [directions_of(delta, anatomy, weights) for delta in deltas]
    facts = {
        **base.facts(), "deltas": names, "corpus": corpus_name(corpus), "sequences": len(encodings),
        "seconds": round(time.perf_counter() - started, 3), **origin(),
    }  # fmt: skip
    tables = {
        "deltas": [_row(*own) for own in zip(names, deltas, moves, from_base, strict=True)],
        "layers": _layers(names, moves, from_base, anatomy.layers),
        "pairs": _pairs(names, pairs, directions),
    }
    return Report("beside", facts, tables, _figures(tables, names, anatomy.layers))


def _names(deltas: Sequence[Delta]) -> list[str]:
    """Names that tell the deltas apart: numbered where two have the same."""
    plain = [delta.name for delta in deltas]
    return [name if plain.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(plain)]


@torch.inference_mode()
def _features(
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


def _row(name: str, delta: Delta, moves: Sequence[Move], features: Sequence[LinearCka]) -> dict[str, Any]:
    metric = task_for(delta.task).main_metric
    return {
        "delta": name, "kind": " + ".join(delta.kinds), "metric": metric,
        "in_domain": delta.metrics.get(metric), "out_of_domain": delta.metrics.get(OOD + metric),
        "frobenius": sum(move.frobenius**2 for move in moves) ** 0.5,
        "cka_last": features[-1].value, "drift_last": features[-1].drift,
    }  # fmt: skip


def _layers(
    names: Sequence[str], moves: Sequence[Sequence[Move]], features: Sequence[Sequence[LinearCka]], layers: int
) -> list[dict[str, Any]]:
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
) -> list[dict[str, Any]]:  # fmt: skip
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


def _figures(tables: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str], layers: int) -> dict[str, Figure]:
    label = "layer (0: embeddings)"

    def lines(column: str, title: str, unit: str) -> Lines:
        curves = {name: [row[column] for row in tables["layers"] if row["delta"] == name] for name in names}
        return Lines(title, list(range(layers + 1)), curves, label, unit)

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
        figures["metrics"] = Figure("What they answer", [Bars("", [row["delta"] for row in held], series, unit)])
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


def _matrix(rows: Sequence[Mapping[str, Any]], names: Sequence[str], column: str, title: str, unit: str) -> HeatMap:
    cells = {(row["first"], row["second"]): row[column] for row in rows}
    values = [[1.0 if a == b else cells.get((a, b), cells.get((b, a))) for b in names] for a in names]
    return HeatMap(title, values, "", "", unit, (0.0, 1.0), names, names)
