"""``analyze prune``: heads and FFN neurons that a task needs least, cut out of the weights, proven and timed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bertology_serve.analysis.figures import Figure, HeatMap, LineChart
from bertology_serve.analysis.head_importance import importance, kept, masked, neuron_importance, normalised
from bertology_serve.analysis.report import AnalysisReport, origin
from bertology_serve.analysis.settings import PruneSettings
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
from bertology_serve.deltas.pruning import Numbers
from bertology_serve.deltas.store import publish
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import obstacle
from bertology_serve.encoder.loading import prune as cut
from bertology_serve.errors import SpecError, Unsupported, VerificationError
from bertology_serve.files import JsonObject, staging
from bertology_serve.kinds.slots import UP


def prune(
    encoder: EncoderLike,
    data: DataLike,
    save: str | Path,
    settings: PruneSettings | None = None,
    *,
    eval: DataLike | None = None,
    delta: DeltaLike = None,
    advance: Advance = silent,
) -> AnalysisReport:
    """Writes the encoder without the heads and FFN neurons that the task of ``delta`` needs least to ``save``.

    Importance (Michel et al. 2019) is measured on the labelled records ``data`` and compared after each layer's is
    scaled to norm 1; shares are those of ``settings``. Published only if, on
    ``eval`` (default: the same records), the pruned encoder's outputs are the masked one's within ``settings.atol``;
    VerificationError otherwise. What is saved is the delta's base, which the delta runs on when it is loaded again.

    Table ``layers``: what stayed of each layer; the facts have both encoders' metrics, parameters and speeds. Raises
    SpecError without a delta and where something lies at ``save``, Unsupported for families that cannot be pruned.
    """
    settings = settings or PruneSettings()
    subject = Subject.of(encoder, delta)
    base = _base(subject)
    reason = obstacle(base)
    if reason is not None:
        raise Unsupported(f"{base.name} cannot be pruned: {reason}; expected BERT, RoBERTa, DistilBERT or ELECTRA")
    target = Path(save).absolute()
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise SpecError(f"{save} exists already; give a new directory for the pruned encoder (--save)")
    judged = TaskEvaluation(subject, data, settings.most, settings.max_tokens)
    trial = judged if eval is None else TaskEvaluation(subject, eval, None, settings.max_tokens)
    heads, neurons, values = _chosen(judged, settings, advance)
    with staging(target) as stage:
        cut(base, heads, neurons, stage)
        small = _opened(str(stage), subject)
        smaller = TaskEvaluation(small, trial.records, None, settings.max_tokens)
        facts = _compared(trial, smaller, heads, neurons, settings)
        difference, size = facts["largest_difference"], facts["largest_output"]
        if not (math.isfinite(size) and difference <= settings.atol * max(1.0, size)):
            raise VerificationError(
                f"the pruned encoder differs from the masked one by {difference:.1e}; at most "
                f"{settings.atol:.1e} of {size:.2g} is accepted, and nothing was written"
            )
        publish(stage, target)
    facts = {
        **subject.facts(), "saved": str(save), "pruned_sha256": small.encoder.ref.sha256, "input": judged.name,
        "examples": len(judged.items), "eval": trial.name, "eval_examples": len(trial.items),
        "metric": trial.task.main_metric, **facts, **origin(),
    }  # fmt: skip
    return _report(subject, heads, neurons, values, facts)


def _base(subject: Subject) -> Encoder:
    """The encoder to cut: a delta of whole weights is one itself, what is pruned is its base."""
    delta = subject.delta
    return Encoder.load(delta.base.name) if delta is not None and delta.weights else subject.encoder


def _opened(path: str, subject: Subject) -> Subject:
    """The pruned encoder of a directory with the subject's delta on it."""
    assert subject.delta is not None
    encoder = Encoder.for_delta(subject.delta, path, device=str(subject.encoder.device))
    encoder.prepack()
    return Subject(encoder, subject.delta).checked()


def _chosen(judged: TaskEvaluation, settings: PruneSettings, advance: Advance) -> tuple[Numbers, Numbers, Tensor]:
    """Heads and neurons that stay, and the heads' scaled importances [L, heads]."""
    anatomy = judged.subject.encoder.anatomy
    values = normalised(importance(judged, advance))
    heads = kept([own[: anatomy.heads_of(layer)] for layer, own in enumerate(values)], settings.heads)
    if settings.neurons:
        raw = neuron_importance(judged, advance)
        scaled = [own / own.norm().clamp(min=torch.finfo(own.dtype).tiny) for own in raw]
        return heads, kept(scaled, settings.neurons, settings.multiple), values
    slot = anatomy.slot(UP)
    return heads, tuple(tuple(range(slot.outputs_of(layer))) for layer in range(anatomy.layers)), values


def _compared(
    trial: TaskEvaluation, smaller: TaskEvaluation, heads: Numbers, neurons: Numbers, settings: PruneSettings
) -> JsonObject:
    """Metrics, outputs, sizes and speeds of the two encoders."""
    encoder, small = trial.subject.encoder, smaller.subject.encoder
    gates = torch.zeros(encoder.anatomy.layers, encoder.anatomy.heads, dtype=encoder.dtype, device=encoder.device)
    for layer, own in enumerate(heads):
        gates[layer, list(own)] = 1.0
    difference, size = torch.zeros(()), torch.zeros(())  # whose maximum keeps a NaN
    with torch.inference_mode():
        for items, others in zip(trial.groups(), smaller.groups(), strict=True):
            with masked(encoder, neurons):
                expected = trial.output(trial.pack(items), Gates(gates))
            found = smaller.output(smaller.pack(others))
            difference = torch.maximum(difference, (found - expected).abs().max().cpu())
            size = torch.maximum(size, expected.abs().max().cpu())
    metric = trial.task.main_metric
    before, after = trial.measure()[metric], smaller.measure()[metric]
    seconds = _timed([trial, smaller], settings.rounds)
    tokens = sum(len(encoding) for item in trial.items for encoding in item.encodings)
    return {
        "heads": [len(head_numbers(encoder.anatomy)), sum(map(len, heads))],
        "neurons": [sum(_widths(encoder)), sum(map(len, neurons))],
        "metric_before": before, "metric_after": after, "largest_difference": float(difference),
        "largest_output": float(size),
        "parameters": [_parameters(encoder), _parameters(small)],
        "megabytes": [4e-6 * _parameters(encoder), 4e-6 * _parameters(small)],
        "tokens_per_s": [tokens / one for one in seconds], "speed_up": seconds[0] / seconds[1],
    }  # fmt: skip


def _widths(encoder: Encoder) -> list[int]:
    slot = encoder.anatomy.slot(UP)
    return [slot.outputs_of(layer) for layer in range(slot.depth)]


def _parameters(encoder: Encoder) -> int:
    return sum(parameter.numel() for parameter in encoder.model.parameters())


@torch.inference_mode()
def _timed(trials: Sequence[TaskEvaluation], rounds: int) -> list[float]:
    """Median seconds of a pass over all examples, the trials taking turns; on a CPU of processor time."""
    clock = time.process_time if trials[0].subject.encoder.device.type == "cpu" else time.perf_counter
    taken: list[list[float]] = [[] for _ in trials]
    for _ in range(rounds):
        for trial, own in zip(trials, taken, strict=True):
            started = clock()
            for items in trial.groups():
                trial.output(trial.pack(items))
            own.append(clock() - started)
    return [median(own) for own in taken]


def _report(subject: Subject, heads: Numbers, neurons: Numbers, values: Tensor, facts: JsonObject) -> AnalysisReport:
    anatomy = subject.encoder.anatomy
    widths = _widths(subject.encoder)
    table = [
        {"layer": layer, "heads_before": anatomy.heads_of(layer), "heads": len(heads[layer]),
         "neurons_before": widths[layer], "neurons": len(neurons[layer]),
         "heads_that_stayed": " ".join(map(str, heads[layer]))}
        for layer in range(anatomy.layers)
    ]  # fmt: skip
    numbers = [layer * anatomy.heads + head for layer, own in enumerate(heads) for head in own]
    stayed = HeatMap("heads that stayed (the others are grey)", mapped(values, numbers), "layer", "head",
                     "|∂L/∂ξ|, scaled")  # fmt: skip
    left = {
        "heads": [100 * len(own) / anatomy.heads_of(layer) for layer, own in enumerate(heads)],
        "neurons": [100 * len(own) / widths[layer] for layer, own in enumerate(neurons)],
    }
    lines = LineChart("what is left of each layer", list(range(anatomy.layers)), left, "layer", "left (%)")
    figure = Figure(f"Pruned: {subject.name}", [stayed, lines], 2)
    return AnalysisReport("prune", facts, {"layers": table}, {"layers": figure})
