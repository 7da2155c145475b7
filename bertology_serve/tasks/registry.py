"""The tasks by name."""

from __future__ import annotations

from bertology_serve.errors import SpecError, nearest
from bertology_serve.tasks.base import Task
from bertology_serve.tasks.classification import Classification
from bertology_serve.tasks.embedding import Embedding
from bertology_serve.tasks.multi_label import MultiLabel
from bertology_serve.tasks.multiple_choice import MultipleChoice
from bertology_serve.tasks.question_answering import QuestionAnswering
from bertology_serve.tasks.regression import Regression
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.tasks.token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    task.kind: task
    for task in (
        Classification,
        MultiLabel,
        Regression,
        TokenClassification,
        QuestionAnswering,
        MultipleChoice,
        Embedding,
    )
}


def task_named(kind: str) -> type[Task]:
    """The task of that name; SpecError names the nearest."""
    if kind not in TASKS:
        raise SpecError(f"unknown task {kind!r}; {nearest(kind, TASKS)}")
    return TASKS[kind]


def task_for(spec: TaskSpec) -> Task:
    """The task that a spec describes."""
    return task_named(spec.kind)(spec)
