"""Metrics of a delta: while it is in training, and of a saved one through the engine that serves it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, takewhile
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import DataError
from bertology_serve.tasks.base import Answer, Task
from bertology_serve.tasks.classification import LabelTask
from bertology_serve.tasks.heads import outputs_of
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import WHOLE_BATCH, ZERO_SHOT
from bertology_serve.training.batches import Item, micro_batches
from bertology_serve.training.evaluation import Evaluation, Records
from bertology_serve.training.processes import ALONE, Processes

if TYPE_CHECKING:
    from bertology_serve.tasks.zero_shot import ZeroShot


def evaluate(
    delta: Delta,
    records: Records,
    encoder: Encoder | None = None,
    max_tokens: int = 4096,
    advance: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Answers labelled (fields, where) records with a delta, as the server would, and compares.

    ``encoder`` defaults to the delta's base. ``advance`` is told the number of records as they are answered. Raises
    DataError naming the record that is wrong, a label that the delta does not know included.
    """
    encoder = encoder or Encoder.for_delta(delta)
    rows = list(records)
    if not rows:
        raise DataError("no records were found; expected at least one")
    if delta.task.kind == ZERO_SHOT:  # whatever labels it was trained on
        delta = replace(delta, task=cast("ZeroShot", task_for(delta.task)).among(rows))
    task = task_for(delta.task)
    pipeline = Pipeline(encoder)
    pipeline.add(delta)
    examples = [task.example(fields, where, labelled=True) for fields, where in rows]
    requests = (Request(delta.name, fields, where=where) for fields, where in rows)
    answers: list[Answer] = []
    truncated = 0
    for prediction in pipeline.stream(requests, max_tokens):
        told = prediction.as_dict()  # what was cut says so
        answers.append({name: value for name, value in told.items() if name not in ("delta", "version", "task")})
        truncated += prediction.truncated
        advance(1)
    return Evaluation(task.metrics(answers, examples), answers, truncated, task, examples, rows)


def measure(
    live: TrainableDelta, task: Task, items: Sequence[Item], max_tokens: int, processes: Processes = ALONE
) -> dict[str, float]:
    """Metrics of a delta under training, in float32 and without dropout; ``loss`` too where it adds up over batches.

    That of a task with labels is the loss after calibration: how sure a head is changes as it trains, and is settled
    in the end. Several processes divide the items, and all get the metrics.
    """
    answers, loss = _answered(live, task, items, max_tokens, processes)
    metrics = task.metrics(answers, [item.example for item in items])
    weight = max(1, task.weight([item.target for item in items]))
    alone = isinstance(task, LabelTask) or task.kind not in WHOLE_BATCH
    return {**metrics, "loss": loss / weight} if alone else metrics


def answered(live: TrainableDelta, task: Task, items: Sequence[Item], max_tokens: int) -> list[Answer]:
    """The answers of a delta under training, in the items' order."""
    return _answered(live, task, items, max_tokens, ALONE)[0]


def _answered(
    live: TrainableDelta, task: Task, items: Sequence[Item], max_tokens: int, processes: Processes
) -> tuple[list[Answer], float]:
    """The answers, and the sum of the losses."""
    numbers = {id(item): number for number, item in enumerate(items)}
    answers: dict[int, Answer] = {}
    logits: dict[int, Tensor] = {}
    loss = 0.0
    for group in micro_batches(items, max_tokens, not live.encoder.packs)[processes.rank :: processes.count]:
        out, outputs = run(live, group)
        for item, own in zip(group, outputs, strict=True):
            answers[numbers[id(item)]] = task.decode(item.example, item.encodings, own)
            if isinstance(task, LabelTask):
                logits[numbers[id(item)]] = own[0]
        if task.kind not in WHOLE_BATCH and not isinstance(task, LabelTask):
            loss += float(task.loss(out, _lengths(group), [item.target for item in group]))
    parts = processes.gathered((answers, logits, loss))
    found = {number: answer for own, _, _ in parts for number, answer in own.items()}
    if isinstance(task, LabelTask) and items:
        rows = {number: row for _, own, _ in parts for number, row in own.items()}
        whole = torch.stack([rows[number] for number in range(len(items))])
        loss = task.tempered_loss(whole, [item.target for item in items])
    else:
        loss = sum(own for _, _, own in parts)
    return [found[number] for number in range(len(items))], loss


@torch.inference_mode()
def run(live: TrainableDelta, items: Sequence[Item]) -> tuple[Tensor, list[list[Tensor]]]:
    """The head's output for one batch as the loss takes it, and for each item what ``decode`` does, float32.

    Of items that are compared with labels it is the logits of all labels.
    """
    mode, encodings = live.training, [item.encodings for item in items]
    task, tokenizer = task_for(live.task), live.encoder.tokenizer
    beside = [task.encode_beside(text, tokenizer) for text in task.beside(items[0].example)] if items else []
    if beside:  # of training items without the labels that were drawn for them
        encodings = [(own[0], *takewhile(lambda one: one.continues, own[1:])) for own in encodings]
    live.eval()
    out: Tensor = live([*chain.from_iterable(encodings), *beside])
    live.train(mode)
    if beside:
        out = task.compared(out[: -len(beside)], out[-len(beside) :])
        return out, [[row] for row in out.cpu()]
    return out, outputs_of(out.float().cpu(), encodings, live.task)


def _lengths(items: Sequence[Item]) -> list[int]:
    return [len(encoding) for item in items for encoding in item.encodings]
