"""What a delta learns from its dev set once it is trained: a temperature for its scores, thresholds for its labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.tasks.base import Answer, Item
from bertology_serve.tasks.classification import LabelTask
from bertology_serve.tasks.metrics import Flags, Floats, calibration_error
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import EMBEDDING, EVEN, MULTI_LABEL, ZERO_SHOT
from bertology_serve.training.batches import micro_batches
from bertology_serve.training.evaluation import run

if TYPE_CHECKING:
    from bertology_serve.tasks.zero_shot import ZeroShot

RANGED = 1000  # items by which the ranges of an embedding's dimensions are found


@dataclass(frozen=True)
class Settled:
    """The dev items' metrics and answers, and what provenance says of it; all empty where nothing was to be settled.

    Thresholds are not in the metrics, as they are not in those of the probe beside: the dev items chose them.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)


Judged = tuple[Tensor, Sequence[Item]]
"""Logits [N, C] of records that training did not see, and these."""


def judged_on(parts: Sequence[tuple[TrainableDelta, Sequence[Item]]], max_tokens: int) -> Judged | None:
    """What each delta says of its own items; None where there are no scores that could be calibrated."""
    if not isinstance(task_for(parts[0][0].task), LabelTask):
        return None
    return torch.cat([_logits(live, items, max_tokens) for live, items in parts]), [i for _, own in parts for i in own]


@contextmanager
def settled(
    live: TrainableDelta,
    dev: Sequence[Item],
    max_tokens: int,
    calibrate: bool = True,
    judged: Judged | None = None,
) -> Iterator[Settled]:
    """While it lasts the head is scaled so that its scores are calibrated on the ``dev`` items, and ``live.task`` has
    thresholds where labels have some; then both are as they were, as a run that is continued must find them.

    ``judged`` takes the place of the live delta's answers to ``dev``; there are no metrics then, which are others'.
    Nothing happens without items, or for tasks that have no such scores.

    Dividing the logits by a temperature is dividing the last layer by it: whatever runs the delta, in whatever format,
    gives calibrated scores, and the answers' order stays as it was.
    """
    task = task_for(live.task)
    if not (dev or judged) or not isinstance(task, LabelTask):
        yield Settled()
        return
    with kept(live):
        found = _settle(live, task, *(judged or (_logits(live, dev, max_tokens), dev)), calibrate)
        yield Settled(facts=found.facts) if judged else found


@contextmanager
def kept(live: TrainableDelta) -> Iterator[None]:
    """Puts head and task back as they were."""
    task, head = live.task, {name: tensor.clone() for name, tensor in live.head.state_dict().items()}
    try:
        yield
    finally:
        live.head.load_state_dict(head)
        live.task = task


def _settle(live: TrainableDelta, task: LabelTask, logits: Tensor, dev: Sequence[Item], calibrate: bool) -> Settled:
    targets = [item.target for item in dev]
    examples: list[Any] = [item.example for item in dev]
    found: dict[str, Any] = {}
    if calibrate:
        by = task.temperature(logits, targets)
        before, after = (_error(task, dev, rows) for rows in (logits, logits / by))
        if after > before:
            by, after = 1.0, before
        found = {"temperature": by, "rows": len(dev), "ece_before": before, "ece": after}
        with torch.no_grad():
            for parameter in live.head.layers[-1].linear.parameters() if live.head.layers else ():  # type: ignore[union-attr]
                parameter.div_(by)
        logits = logits / by
        if task.kind == ZERO_SHOT:
            bias = cast("ZeroShot", task).bias(logits, targets)
            live.task = replace(live.task, scale=live.task.scale / by, bias=bias)
    if task.kind == MULTI_LABEL:
        has, lacks = task.rows(targets).chunk(2, 1)
        chosen = thresholds(task.probabilities(logits).numpy(), (has > lacks).numpy(), (has + lacks > 0).numpy())
        live.task = replace(live.task, thresholds=chosen)
        final = task_for(live.task)
        assert isinstance(final, LabelTask)
        found["thresholds"] = {"rows": len(dev), **final.metrics(_answers(final, dev, logits), examples)}
    loss = float(task.loss(logits, [], targets)) / len(dev)
    answers = _answers(task, dev, logits)
    return Settled({**task.metrics(answers, examples), "loss": loss}, {"calibration": found} if found else {}, answers)


def thresholds(scores: Floats, gold: Flags, known: Flags) -> tuple[float, ...]:
    """The least score [C] of each label with which micro F1 is highest; scores, gold and known are [N, C].

    At the optimum F of micro F1 a label is worth naming where that adds more to 2 TP than F times what it adds to what
    is named (Lipton et al. 2014, arXiv 1402.1892): first one threshold for all, then each label's own. A threshold
    moves only where the rows between the old and the new show by two standard errors that it should.
    """
    flat, right = _falling(scores[known], gold[known])
    if not right.any():
        return (EVEN,) * int(scores.shape[1])
    best = float((2 * np.cumsum(right) / (np.arange(1, len(flat) + 1) + right.sum())).max())
    common = _cut(flat, right, best, EVEN)
    parts = ((scores[known[:, label], label], gold[known[:, label], label]) for label in range(scores.shape[1]))
    return tuple(_cut(*_falling(*part), best, common) for part in parts)


def _falling(scores: Floats, right: Flags) -> tuple[Floats, Flags]:
    order = np.argsort(-scores, kind="stable")
    return scores[order], right[order]


def _cut(falling: Floats, right: Flags, f1: float, old: float) -> float:
    """Half-way between the last score that is worth naming and the next; ``old`` where that is hardly better."""
    worth = np.where(right, 2.0, 0.0) - f1
    total = np.concatenate([[0.0], np.cumsum(worth)])
    named, best = int((falling >= old).sum()), int(total.argmax())
    between = worth[min(named, best) : max(named, best)]
    if total[best] - total[named] <= 2.0 * float(np.sqrt(np.square(between).sum())):
        return old
    edges = np.concatenate([[1.0], falling, [0.0]])
    return float(edges[best] + edges[best + 1]) / 2


def with_ranges(delta: Delta, live: TrainableDelta, items: Sequence[Item], max_tokens: int) -> Delta:
    """An embedding delta with the least and the greatest value of each dimension over the texts of at most so many
    items, evenly drawn, by which its vectors are made bytes; others as they are.
    """
    if live.task.kind != EMBEDDING or not items:
        return delta
    drawn, found = items[:: -(-len(items) // RANGED)], []
    for group in micro_batches(drawn, max_tokens, not live.encoder.packs):
        rows = run(live, group)[0].float().cpu()
        rows = F.normalize(rows) if live.task.normalize else rows
        found.append(torch.stack([rows.amin(0), rows.amax(0)]))
    table = torch.stack(found)
    low, high = (tuple(float(f"{x:.7g}") for x in side.tolist()) for side in (table[:, 0].amin(0), table[:, 1].amax(0)))
    return replace(delta, task=replace(delta.task, ranges=(low, high)))


def _logits(live: TrainableDelta, items: Sequence[Item], max_tokens: int) -> Tensor:
    """The head's outputs [N, C] for items, in their order."""
    place = {id(item): number for number, item in enumerate(items)}
    rows = torch.empty(len(items), live.task.outputs or len(live.task.labels))
    for group in micro_batches(items, max_tokens, not live.encoder.packs):
        rows[[place[id(item)] for item in group]] = run(live, group)[0].float().cpu()
    return rows


def _answers(task: LabelTask, items: Sequence[Item], logits: Tensor) -> list[Answer]:
    return [task.decode(item.example, item.encodings, [row]) for item, row in zip(items, logits, strict=True)]


def _error(task: LabelTask, items: Sequence[Item], logits: Tensor) -> float:
    return calibration_error(task.certainty(_answers(task, items, logits), [item.example for item in items]))
