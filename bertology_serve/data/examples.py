"""Records -> examples of a task, and the labels that a data set calls for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bertology_serve.data.records import read_records
from bertology_serve.errors import DataError
from bertology_serve.tasks.base import Example, Task
from bertology_serve.tasks.registry import task_named
from bertology_serve.tasks.spec import CLASSIFICATION


def load_examples(
    path: str | Path,
    task: Task,
    columns: Mapping[str, str] | None = None,
    labelled: bool = True,
    remembered: Mapping[str, str] | None = None,
) -> list[Example]:
    """The checked examples of a file or hub data set; see ``read_records`` for paths and columns.

    Raises DataError for the first record that does not fit the task.
    """
    return [task.example(fields, where, labelled) for fields, where in read_records(path, columns, remembered)]


def infer_labels(kind: str, records: Iterable[tuple[Mapping[str, Any], str]]) -> tuple[str, ...]:
    """The ``TaskSpec.labels`` for a task of that kind, from training records: stable whatever their order.

    Raises DataError when classification finds fewer than two labels.
    """
    labels = task_named(kind).labels_in(records)
    if kind == CLASSIFICATION and len(labels) < 2:
        raise DataError(f"the training data holds only the label {', '.join(labels) or 'none'}; expected at least two")
    return labels
