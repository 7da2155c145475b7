"""Metrics of a delta, in training or saved, and what they say: by class, by slice, beside another, where wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import DataError, SpecError, nearest
from bertology_serve.tasks.base import Answer, Example, Item, Task
from bertology_serve.tasks.classification import LabelTask
from bertology_serve.tasks.fields import number_of, with_label_lists
from bertology_serve.tasks.heads import outputs_of
from bertology_serve.tasks.metrics import (
    Floats,
    Interval,
    bootstrap,
    gaps,
    mcnemar,
    mean_of,
    of_ranking,
    paired_effect,
    ratio,
)
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import CLASSIFICATION, REGRESSION, VECTOR_KINDS, WHOLE_BATCH, ZERO_SHOT
from bertology_serve.training.batches import micro_batches
from bertology_serve.training.processes import ALONE, Processes

if TYPE_CHECKING:
    from bertology_serve.tasks.zero_shot import ZeroShot


Records = Iterable[tuple[Mapping[str, Any], str]]
MOST_SLICES = 20
MISSING = "(no value)"


@dataclass(frozen=True)
class ClassScores:
    """How one label does; ``support`` is how often it is right to name it."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Slice:
    """The records that share a value: how many, their metrics, and the main one's interval."""

    value: str
    rows: int
    metrics: dict[str, float]
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """A delta beside another on the same records. ``gain`` is that of the main metric, ``effect`` Cohen's d of how good
    the answers are, ``mcnemar_p`` for metrics that count right answers; ``fixed`` and ``broken`` are the records that
    only one of them has right.
    """

    gain: Interval
    effect: float
    mcnemar_p: float | None
    fixed: tuple[int, ...]
    broken: tuple[int, ...]


@dataclass(frozen=True)
class Evaluation:
    """``metrics`` as fractions, the answer to each example, in order, and how many texts were cut to the delta's
    maximum length; ``records`` are those that the ``examples`` come from.
    """

    metrics: dict[str, float]
    answers: list[Answer]
    truncated: int
    task: Task
    examples: Sequence[Example]
    records: Sequence[tuple[Mapping[str, Any], str]]

    @property
    def metric(self) -> str:
        return next(iter(self.metrics))

    @property
    def parts(self) -> Floats:
        """[N, 2]: what each answer brings to the main metric."""
        return self.task.parts(self.answers, self.examples)

    @property
    def interval(self) -> Interval:
        """The main metric."""
        return self._interval(self.parts)

    def _interval(self, parts: Floats) -> Interval:
        return bootstrap(len(parts), lambda drawn: self.task.main(parts[drawn]), self.task.bounds(parts))

    def gain(self, task: Task, answers: Sequence[Answer]) -> Interval:
        """By how much the main metric is above that of other answers to the same examples (paired bootstrap)."""
        own, other = self.parts, task.parts(answers, self.examples)
        (low, high), (least, most) = self.task.bounds(own), task.bounds(other)
        bounds = (low - most, high - least)
        return bootstrap(len(own), lambda drawn: self.task.main(own[drawn]) - task.main(other[drawn]), bounds)

    def against(self, other: Evaluation) -> Comparison:
        """This beside an earlier or another delta. Raises SpecError where both do not answer the same."""
        if other.metric != self.metric or len(other.examples) != len(self.examples):
            raise SpecError(f"{other.task.kind} cannot be compared with {self.task.kind}; give deltas of one task")
        mine, theirs = (one.task.quality(one.answers, one.examples) for one in (self, other))
        fixed, broken = (np.flatnonzero((a == 1) & (b != 1)) for a, b in ((mine, theirs), (theirs, mine)))
        counted = (self.parts[:, 1] == 1).all() and np.isin(self.parts[:, 0], (0, 1)).all()
        p = mcnemar(len(fixed), len(broken)) if counted else None
        gain = self.gain(other.task, other.answers)
        return Comparison(gain, paired_effect(mine - theirs), p, tuple(fixed.tolist()), tuple(broken.tolist()))

    @property
    def classes(self) -> list[ClassScores]:
        """Each label's scores, in the task's order; of spans by their label. Empty for tasks without labels."""
        pairs = self.task.named(self.answers, self.examples)
        labels = {label: 0 for gold, found in pairs for label, *_ in (*gold, *found)}
        right, gold, found = dict(labels), dict(labels), dict(labels)
        for expected, given in pairs:
            for counts, items in ((right, expected & given), (gold, expected), (found, given)):
                for label, *_ in items:
                    counts[label] += 1
        known = [label for label in self.task.spec.labels if label in labels]
        order = [*known, *sorted(labels.keys() - set(known))]
        return [
            ClassScores(
                label,
                ratio(right[label], found[label]),
                ratio(right[label], gold[label]),
                ratio(2 * right[label], gold[label] + found[label]),
                gold[label],
            )
            for label in order
        ]

    @property
    def confusion(self) -> tuple[list[str], list[list[int]]] | None:
        """Labels, and how often each (down) was answered by each (across); None for other tasks than classification."""
        if self.task.kind not in (CLASSIFICATION, ZERO_SHOT):
            return None
        labels = list(self.task.spec.labels)
        index, table = {label: i for i, label in enumerate(labels)}, [[0] * len(labels) for _ in labels]
        for gold, found in self.task.named(self.answers, self.examples):
            for (right, *_), (given, *_) in zip(gold, found, strict=True):
                table[index[right]][index[given]] += 1
        return labels, table

    @property
    def calibration(self) -> Interval | None:
        """The expected calibration error in 15 bins; None where there are no such scores."""
        if not isinstance(self.task, LabelTask) or not len(self.certainty):
            return None
        pairs = zip(self.answers, self.examples, strict=True)
        each = [self.task.certainty([answer], [example]) for answer, example in pairs]
        table, counts = np.stack([gaps(own).sum(0) for own in each]), np.array([len(own) for own in each])
        return bootstrap(len(each), lambda drawn: ratio(np.abs(table[drawn].sum(0)).sum(), counts[drawn].sum()))

    @property
    def certainty(self) -> Floats:
        """[M, 2]: probabilities, and whether each came true."""
        assert isinstance(self.task, LabelTask)
        return self.task.certainty(self.answers, self.examples)

    def slices(self, column: str) -> list[Slice]:
        """The records by what they have in a column, largest first; numbers in order, many of them in four equal parts.

        Numbers are those of a column that holds nothing else, texts of numbers included. Records without a value are
        one slice, the rarest of many values another. Raises DataError where no record has the column.
        """
        found = []
        for name, rows in slices_of(self.column(column)):
            answers, examples = [self.answers[i] for i in rows], [self.examples[i] for i in rows]
            interval = self._interval(self.task.parts(answers, examples))
            found.append(Slice(name, len(rows), self.task.metrics(answers, examples), interval))
        return found

    def column(self, name: str) -> list[object]:
        """What each record has in a column. Raises DataError where none has it."""
        if not any(name in fields for fields, _ in self.records):
            known = dict.fromkeys(name for fields, _ in self.records for name in fields)
            raise DataError(f"no record has the column {name!r}; {nearest(name, known)}")
        return [fields.get(name) for fields, _ in self.records]

    def ranking(self, column: str) -> dict[str, float]:
        """The metrics of a search where records of one value of a column are a query's candidates, the mean over
        queries to which one at least is relevant.

        Candidates are ranked by their value or similarity, or the grade that is expected where labels are numbers (of
        two labels the second is relevant). Raises SpecError where answers rank nothing, DataError where none is
        relevant.
        """
        if isinstance(self.task, LabelTask) and self.task.kind == CLASSIFICATION:
            labels = self.task.spec.labels
            numbers = all(label.isdecimal() for label in labels)
            if not numbers and len(labels) > 2:
                raise SpecError(
                    f"{len(labels)} labels that are no numbers rank nothing; expected two labels, or grades"
                )
            grade = {label: float(label) if numbers else float(index) for index, label in enumerate(labels)}
            gold = np.array([grade[example.label] for example in self.examples])  # type: ignore[attr-defined]
            found = np.array([sum(grade[label] * p for label, p in one["scores"].items()) for one in self.answers])
        elif self.parts.shape == (len(self.answers), 2) and self.task.kind in (REGRESSION, *VECTOR_KINDS):
            gold, found = self.parts.T
        else:
            raise SpecError(f"answers of {self.task.kind} rank nothing; expected scored pairs, or two labels")
        places: dict[object, list[int]] = {}
        for place, value in enumerate(self.column(column)):
            places.setdefault(value, []).append(place)
        ranked = [gold[rows][np.argsort(-found[rows], kind="stable")] for rows in places.values()]
        results = [of_ranking(grades) for grades in ranked if grades.max() > 0]
        if not results:
            raise DataError("no record is relevant to its query; expected a score above 0, or the second label")
        return {"queries": float(len(results)), **mean_of(results)}

    def errors(self) -> list[dict[str, Any]]:
        """What went wrong, the worst first: where, how good (1: right), the record, and the answer."""
        quality = self.task.quality(self.answers, self.examples)
        return [
            self.row(int(i)) | {"quality": float(quality[i])}
            for i in np.argsort(quality, kind="stable")
            if quality[i] < 1
        ]

    def row(self, number: int) -> dict[str, Any]:
        """One record with its answer."""
        fields, where = self.records[number]
        return {"where": where, "record": dict(fields), "answer": self.answers[number]}


def as_json(comparison: Comparison | ClassScores | Slice | Interval) -> dict[str, Any]:
    """Its fields; of records only how many."""
    found = asdict(comparison)
    return {name: len(value) if name in ("fixed", "broken") else value for name, value in found.items()}


def slices_of(values: Sequence[object]) -> list[tuple[str, list[int]]]:
    """The name of each slice and where its values are; see ``Evaluation.slices``. Every value is in one of them."""
    numbers = [math.nan if isinstance(value, bool) else number_of(value) for value in values]
    missing = [i for i, value in enumerate(values) if _is_missing(value)]
    present = sorted({*range(len(values))} - {*missing})
    numeric = all(math.isfinite(numbers[i]) for i in present)
    places: dict[object, list[int]] = {}
    for i in present:
        places.setdefault(numbers[i] if numeric else str(values[i]), []).append(i)
    named = [(str(values[rows[0]]), rows) for rows in sorted(places.values(), key=len, reverse=True)]
    if numeric and len(named) > MOST_SLICES:
        named = _quarters(numbers, present)
    elif numeric:
        named.sort(key=lambda item: numbers[item[1][0]])
    elif len(named) > MOST_SLICES:
        rest = named[MOST_SLICES:]
        named[MOST_SLICES:] = [(f"({len(rest)} other values)", [i for _, rows in rest for i in rows])]
    return [*named, *([(MISSING, missing)] if missing else [])]


def _is_missing(value: object) -> bool:
    blank = isinstance(value, str) and not value.strip()
    return value is None or blank or (isinstance(value, float) and math.isnan(value))


def _quarters(numbers: Sequence[float], present: Sequence[int]) -> list[tuple[str, list[int]]]:
    edges = np.quantile([numbers[i] for i in present], (0, 0.25, 0.5, 0.75, 1)).tolist()
    quarters: list[list[int]] = [[], [], [], []]
    for i in present:
        quarters[int(np.searchsorted(edges[1:-1], numbers[i]))].append(i)
    return [(f"{edges[at]:.10g} to {edges[at + 1]:.10g}", rows) for at, rows in enumerate(quarters) if rows]


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
    rows = with_label_lists(records)
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
