"""``analyze heads``: which heads a delta's task needs, and what is left of the metric as heads are masked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from torch import Tensor

from bertology_serve.analysis.figures import Figure, HeatMap, Lines
from bertology_serve.analysis.importance import importance, left_out, normalised
from bertology_serve.analysis.labelled import TaskEvaluation
from bertology_serve.analysis.report import Report, origin
from bertology_serve.analysis.settings import HeadSettings
from bertology_serve.analysis.subject_model import Advance, Subject, head_numbers, mapped, silent
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder

IMPORTANCE, LEFT_OUT, RANDOM = "least important first", "leave-one-out order", "random order"
Curves = Mapping[str, Sequence[Sequence[float]]]  # order -> one curve a seed, a value a share


def heads(
    backbone: str | Encoder | Subject | None = None,
    input: str | Path = "",
    settings: HeadSettings | None = None,
    *,
    eval: str | Path | None = None,
    delta: Delta | str | Path | None = None,
    advance: Advance = silent,
) -> Report:
    """Importance of every head on labelled records, and the pruning curve on ``eval`` (default: the same records).

    Heads are masked by gates, lowest importance first after each layer's importances are scaled to norm 1 (Michel et
    al. 2019), without training again; beside that ``seeds`` random orders. Raises SpecError without a delta.
    """
    settings = settings or HeadSettings()
    subject = Subject.of(backbone, delta)
    judged = TaskEvaluation(subject, input, settings.most, settings.max_tokens)
    trial = judged if eval is None else TaskEvaluation(subject, eval, None, settings.max_tokens)
    started = time.perf_counter()
    raw = importance(judged, advance)
    rises = left_out(judged, advance) if settings.leave_one_out else None
    orders = _orders(normalised(raw), rises, settings, head_numbers(subject.encoder.anatomy))
    shares = [step / settings.steps for step in range(settings.steps + 1)]
    curves = _curves(trial, orders, shares, advance)
    facts = {
        **subject.facts(), "input": judged.name, "examples": len(judged.items), "eval": trial.name,
        "eval_examples": len(trial.items), "metric": trial.task.main_metric,
        "unmasked": curves[IMPORTANCE][0][0], "tolerance": settings.tolerance,
        "share_within_tolerance": {order: _within(curves[order], shares, settings.tolerance) for order in curves},
        "seconds": round(time.perf_counter() - started, 3), **origin(),
    }  # fmt: skip
    return _report(subject, raw, rises, curves, shares, facts)


def _orders(
    values: Tensor, rises: Tensor | None, settings: HeadSettings, numbers: Sequence[int]
) -> dict[str, list[list[int]]]:
    """Flat head numbers in the order in which they go; several for the random one."""
    generator = torch.Generator().manual_seed(settings.seed)
    orders = {IMPORTANCE: [going(values, numbers)]}
    if rises is not None:
        orders[LEFT_OUT] = [going(rises, numbers)]
    drawn = [[numbers[i] for i in torch.randperm(len(numbers), generator=generator)] for _ in range(settings.seeds)]
    return {**orders, RANDOM: drawn} if drawn else orders


def going(values: Tensor, numbers: Sequence[int]) -> list[int]:
    """Flat numbers of heads, that of the lowest value [L, heads] first."""
    return [numbers[i] for i in values.flatten()[list(numbers)].argsort(stable=True)]


def _curves(
    trial: TaskEvaluation, orders: Mapping[str, list[list[int]]], shares: Sequence[float], advance: Advance
) -> Curves:
    """The metric at every share of masked heads. What all orders share, nothing and everything, is measured once."""
    encoder = trial.subject.encoder
    known: dict[frozenset[int], float] = {}
    curves: dict[str, list[list[float]]] = {}
    total, done = sum(map(len, orders.values())) * len(shares), 0
    for name, runs in orders.items():
        for order in runs:
            curve = []
            for share in shares:
                gone = frozenset(order[: round(share * len(order))])
                if gone not in known:
                    gates = torch.ones(
                        encoder.anatomy.layers, encoder.anatomy.heads, dtype=encoder.dtype, device=encoder.device
                    )
                    gates.view(-1)[list(gone)] = 0.0
                    known[gone] = trial.measure(gates)[trial.task.main_metric]
                curve.append(known[gone])
                done += 1
                advance(done, total)
            curves.setdefault(name, []).append(curve)
    return curves


def _within(curves: Sequence[Sequence[float]], shares: Sequence[float], tolerance: float) -> float:
    """The largest share up to which the mean curve never falls more than ``tolerance`` below its start."""
    means = [mean(values) for values in zip(*curves, strict=True)]
    best = 0.0
    for share, value in zip(shares, means, strict=True):
        if value < means[0] - tolerance - 1e-12:
            break
        best = share
    return best


def _report(
    subject: Subject, raw: Tensor, rises: Tensor | None, curves: Curves, shares: Sequence[float], facts: dict[str, Any]
) -> Report:
    scaled, numbers = normalised(raw), head_numbers(subject.encoder.anatomy)
    rank = {head: place for place, head in enumerate(going(scaled, numbers), 1)}
    table = [
        {"layer": n // raw.shape[1], "head": n % raw.shape[1], "importance": float(raw.flatten()[n]),
         "normalised": float(scaled.flatten()[n]), "goes": rank[n],
         **({} if rises is None else {"loss_rise": float(rises.flatten()[n])})}
        for n in numbers
    ]  # fmt: skip
    rows = [
        {"order": name, "run": run, "share": share, "heads_masked": round(share * len(numbers)), facts["metric"]: value}
        for name, runs in curves.items() for run, curve in enumerate(runs)
        for share, value in zip(shares, curve, strict=True)
    ]  # fmt: skip
    panels = [
        HeatMap("importance, each layer scaled to norm 1", mapped(scaled, numbers), "layer", "head", "|∂L/∂ξ|, scaled")
    ]
    if rises is not None:
        panels.append(HeatMap("left out alone", mapped(rises, numbers), "layer", "head", "rise of the loss"))
    means = {name: [mean(values) for values in zip(*runs, strict=True)] for name, runs in curves.items()}
    spread = {name: [pstdev(values) for values in zip(*runs, strict=True)] for name, runs in curves.items()
              if len(runs) > 1}  # fmt: skip
    level = facts["unmasked"] - facts["tolerance"]
    means, spread = ({f"{name} (mean ± s.d. of {len(curves[name])})" if name in spread else name: values
                      for name, values in found.items()} for found in (means, spread))  # fmt: skip
    lines = Lines("", [100 * share for share in shares], means, "heads masked (%)", f"{facts['metric']} (fraction)",
                  spread, level, f"{facts['tolerance']:g} below unmasked")  # fmt: skip
    figures = {
        "importance": Figure(f"Heads that the task needs: {subject.name}", panels, 2),
        "curve": Figure(f"Pruning curve: {subject.name}", [lines]),
    }
    return Report("heads", facts, {"importance": table, "curve": rows}, figures)
