"""What both sides train: the sets, their rows, the rates and the shapes of the deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from bertology_serve.data.records import Record, read_records
from bertology_serve.data.sets import DataSet, official_metrics, set_named
from bertology_serve.tasks.base import Answer, Example, Task
from bertology_serve.tasks.registry import task_for, task_named
from bertology_serve.tasks.spec import QUESTION_ANSWERING, TaskSpec
from bertology_serve.training.train_config import LEARNING_RATES

BATCH, STRIDE = 16, 64
SETS: Mapping[str, tuple[str, str]] = {
    "sst2": ("glue/sst2", "dev"),
    "mrpc": ("glue/mrpc", "dev"),
    "rte": ("glue/rte", "dev"),
    "cola": ("glue/cola", "dev"),
    "banking77": ("banking77", "test"),
    "stsb": ("glue/stsb", "dev"),
    "wnut17": ("wnut17", "dev"),
    "squad": ("squad", "dev"),
}
"""Name -> the set and the split that is measured."""
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"rank": 8, "alpha": 16.0},
    "prefix": {"length": 20},
    "prompt": {"length": 20},
    "ia3": {},
}


@dataclass(frozen=True)
class Work:
    """One training: a set, its rows, the rows that are measured, a method, a seed and the passes over the rows."""

    name: str
    known: DataSet
    labels: tuple[str, ...]
    train: Sequence[Record]
    dev: Sequence[Record]
    method: str
    seed: int
    epochs: int

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens."""
        return 384 if self.known.task == QUESTION_ANSWERING else 128

    @property
    def rate(self) -> float:
        """The learning rate of delta and head, three times the method's own where every token is answered for.

        At LoRA's 1e-3, 1,000 rows of WNUT17 teach next to nothing (F1 2.8, against 38.4 on half of the rows measured).
        """
        return LEARNING_RATES[self.method] * (3 if self.task.spec.per_token else 1)

    @property
    def task(self) -> Task:
        """The task with its labels."""
        return task_for(TaskSpec(self.known.task, self.labels, self.max_length, stride=STRIDE))

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """The records, checked."""
        return [self.task.example(fields, where, labelled=True) for fields, where in records]

    def official(self, answers: Sequence[Answer]) -> dict[str, float]:
        """The set's own metrics of one answer to each measured row."""
        return official_metrics(self.known, self.task.metrics(answers, self.examples(self.dev)), answers, self.dev)


def works(name: str, method: str, seeds: int, rows: int, dev_rows: int | None, epochs: int) -> list[Work]:
    """The trainings of one cell, a seed each; rows are drawn once, labels are those of the whole training split."""
    full, split = SETS[name]
    known = set_named(full)
    every, dev = (read_records(f"set:{full}:{part}") for part in ("train", split))
    labels = task_named(known.task).labels_in(every)
    drawn, measured = _drawn(every, rows), _drawn(dev, dev_rows or len(dev))
    return [Work(name, known, labels, drawn, measured, method, seed, epochs) for seed in range(seeds)]


def _drawn(records: Sequence[Record], most: int) -> list[Record]:
    return Random(0).sample(records, min(most, len(records)))
