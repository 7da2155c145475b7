"""How much each head and each FFN neuron matters to a task, and the task's metric as heads are masked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from statistics import mean, pstdev

import torch
from torch import Tensor

from bertology_serve.analysis.figures import Figure, HeatMap, LineChart
from bertology_serve.analysis.report import AnalysisReport, origin
from bertology_serve.analysis.settings import HeadSettings
from bertology_serve.analysis.subject_model import (
    Advance,
    DeltaLike,
    EncoderLike,
    Gates,
    Subject,
    TaskEvaluation,
    head_numbers,
    mapped,
    silent,
)
from bertology_serve.data.records import DataLike
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.files import JsonObject
from bertology_serve.kinds.slots import DOWN

IMPORTANCE, LEFT_OUT, RANDOM = "least important first", "leave-one-out order", "random order"
Curves = Mapping[str, Sequence[Sequence[float]]]  # order -> one curve a seed, a value a share


def heads(
    encoder: EncoderLike,
    data: DataLike,
    settings: HeadSettings | None = None,
    *,
    eval: DataLike | None = None,
    delta: DeltaLike = None,
    advance: Advance = silent,
) -> AnalysisReport:
    """How much the task of ``delta`` needs each head, and its metric as heads are masked (Michel et al. 2019).

    Importance is the mean over the labelled records ``data`` of |∂L/∂ξ| (arXiv 1905.10650, eq. 2), ξ a gate on a
    head's output. Heads are then masked on ``eval`` (default: the same records), without training again: the least
    important first, after each layer's importances were scaled to norm 1, and in ``settings.seeds`` random orders.

    Tables: ``importance``, a row a head (float; ``goes`` is its place in the order); ``curve``, the metric (a fraction)
    at every share of masked heads. Raises SpecError without a delta, Unsupported for embeddings and for encoders that
    keep their own attention, DataError naming a record that is wrong.
    """
    settings = settings or HeadSettings()
    subject = Subject.of(encoder, delta)
    judged = TaskEvaluation(subject, data, settings.most, settings.max_tokens)
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
    known: dict[frozenset[int], float] = {}
    curves: dict[str, list[list[float]]] = {}
    total, done = sum(map(len, orders.values())) * len(shares), 0
    for name, runs in orders.items():
        for order in runs:
            curve = []
            for share in shares:
                gone = frozenset(order[: round(share * len(order))])
                if gone not in known:
                    known[gone] = trial.measure(trial.gates(gone))[trial.task.main_metric]
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
    subject: Subject, raw: Tensor, rises: Tensor | None, curves: Curves, shares: Sequence[float], facts: JsonObject
) -> AnalysisReport:
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
    lines = LineChart("", [100 * share for share in shares], means, "heads masked (%)", f"{facts['metric']} (fraction)",
                  spread, level, f"{facts['tolerance']:g} below unmasked")  # fmt: skip
    figures = {
        "importance": Figure(f"Heads that the task needs: {subject.name}", panels, 2),
        "curve": Figure(f"Pruning curve: {subject.name}", [lines]),
    }
    return AnalysisReport("heads", facts, {"importance": table, "curve": rows}, figures)


def importance(trial: TaskEvaluation, advance: Advance = silent) -> Tensor:
    """I_h = E_x |∂L(x)/∂ξ_h| at ξ = 1, over the trial's examples (Michel et al. 2019, eq. 2): [L, heads] float64.

    Every sequence has gates of its own, so that one backward pass a batch gives each example's gradient; L(x) sums
    the loss terms of an example.
    """
    anatomy = trial.subject.encoder.anatomy
    total = torch.zeros(anatomy.layers, anatomy.heads, dtype=torch.float64)
    done = 0
    for items in trial.groups():
        batch = trial.pack(items)
        gates = torch.ones(
            batch.sequences, anatomy.layers, anatomy.heads,
            dtype=trial.subject.encoder.dtype, device=batch.ids.device, requires_grad=True,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(trial.loss(trial.output(batch, Gates(gates)), items), gates)
        owners = [number for number, item in enumerate(items) for _ in item.encodings]
        owner = torch.tensor([owners[original] for original in batch.order], device=gradient.device)
        own = gradient.new_zeros(len(items), *gradient.shape[1:]).index_add(0, owner, gradient)
        total += own.abs().double().sum(0).cpu()
        done += len(items)
        advance(done, len(trial.items))
    return total / len(trial.items)


def normalised(values: Tensor) -> Tensor:
    """Importances [L, heads] with the Euclidean norm of each layer 1, as Michel et al. compare heads across layers."""
    norms: Tensor = values.norm(dim=1, keepdim=True)
    return values / norms.clamp(min=torch.finfo(values.dtype).tiny)


def left_out(trial: TaskEvaluation, advance: Advance = silent) -> Tensor:
    """How much the mean loss rises when one head alone is masked: [L, heads] float64."""
    anatomy = trial.subject.encoder.anatomy
    rises = torch.zeros(anatomy.layers, anatomy.heads, dtype=torch.float64)
    whole = trial.measure()["loss"]
    numbers = head_numbers(anatomy)
    for done, number in enumerate(numbers, 1):
        rises.view(-1)[number] = trial.measure(trial.gates([number]))["loss"] - whole
        advance(done, len(numbers))
    return rises


@contextmanager
def watched(encoder: Encoder, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Passes the input [..., M] of every layer's projection down through ``change(layer, input)``."""
    handles = []
    for layer, path in enumerate(encoder.anatomy.slot(DOWN).paths):

        def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...], layer: int = layer) -> tuple[Tensor, ...]:
            return change(layer, inputs[0]), *inputs[1:]

        handles.append(encoder.model.get_submodule(str(path)).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def masked(encoder: Encoder, kept: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
    """A context in which only these neurons of each layer are heard."""
    slot = encoder.anatomy.slot(DOWN)
    masks = [torch.zeros(slot.inputs_of(layer)) for layer in range(slot.depth)]
    for mask, own in zip(masks, kept, strict=True):
        mask[list(own)] = 1.0
    return watched(encoder, lambda layer, x: x * masks[layer].to(x))


def neuron_importance(trial: TaskEvaluation, advance: Advance = silent) -> list[Tensor]:
    """E_x |∂L(x)/∂ξ_j| at ξ = 1 over the trial's examples: [M] float64 a layer."""
    encoder = trial.subject.encoder
    slot = encoder.anatomy.slot(DOWN)
    totals = [torch.zeros(slot.inputs_of(layer), dtype=torch.float64) for layer in range(slot.depth)]
    one = torch.ones((), dtype=encoder.dtype, device=encoder.device, requires_grad=True)
    done = 0
    for items in trial.groups():
        batch, seen = trial.pack(items), dict[int, Tensor]()

        def keep(layer: int, x: Tensor, seen: dict[int, Tensor] = seen) -> Tensor:
            seen[layer] = x * one  # so that gradients are asked for below the first trained tensor, too
            return seen[layer]

        with watched(encoder, keep):
            loss = trial.loss(trial.output(batch), items)
        gradients = torch.autograd.grad(loss, [seen[layer] for layer in range(slot.depth)])
        owners = trial.owners(batch, items)
        for layer, gradient in enumerate(gradients):
            terms = (seen[layer].detach() * gradient).flatten(0, -2)
            own = terms.new_zeros(len(items), terms.shape[1]).index_add(0, owners, terms)
            totals[layer] += own.abs().double().sum(0).cpu()
        done += len(items)
        advance(done, len(trial.items))
    return [total / len(trial.items) for total in totals]


def kept(values: Sequence[Tensor], share: float, multiple: int = 1) -> tuple[tuple[int, ...], ...]:
    """Numbers that stay in each layer, rising, when ``share`` of all goes, those of the lowest value first.

    values: [n] a layer, compared across layers as they are. The most important of a layer always stays; with
    ``multiple`` as many more as make the layer's number a multiple of it, as far as the layer has them.
    """
    order = sorted((value, layer) for layer, own in enumerate(values) for value in own.tolist())
    left = [len(own) for own in values]
    going = round(share * sum(left))
    for _, layer in order:
        if going and left[layer] > 1:
            left[layer] -= 1
            going -= 1
    counts = [min(len(own), -(-count // multiple) * multiple) for own, count in zip(values, left, strict=True)]
    return tuple(
        tuple(sorted(own.argsort(descending=True, stable=True)[:count].tolist()))
        for own, count in zip(values, counts, strict=True)
    )
