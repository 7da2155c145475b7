"""Tables whose entries are imported when they are first asked for: a run loads only the tasks and kinds that it has.

The tasks stand here: a new one is one file beside this one, and one line below.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from typing import TypeVar

from bertology_serve.errors import SpecError, nearest
from bertology_serve.tasks import spec as names
from bertology_serve.tasks.base import Task
from bertology_serve.tasks.spec import TaskSpec

T = TypeVar("T")


class LazyTable(Mapping[str, T]):
    """Objects by name. ``places`` says where each stands, as ``package.module:OBJECT``; ``what`` they are."""

    def __init__(self, what: str, places: Mapping[str, str]) -> None:
        self._what, self._places, self._found = what, places, dict[str, T]()

    def __getitem__(self, name: str) -> T:
        if name not in self._found:
            self._found[name] = pkgutil.resolve_name(self._places[name])
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def named(self, name: str) -> T:
        """The object of that name; raises SpecError naming the nearest known one."""
        if name not in self:
            raise SpecError(f"unknown {self._what} {name!r}; {nearest(name, self)}")
        return self[name]


TASKS: LazyTable[type[Task]] = LazyTable(
    "task",
    {
        names.CLASSIFICATION: "bertology_serve.tasks.classification:Classification",
        names.MULTI_LABEL: "bertology_serve.tasks.multi_label:MultiLabel",
        names.REGRESSION: "bertology_serve.tasks.regression:Regression",
        names.TOKEN_CLASSIFICATION: "bertology_serve.tasks.token_classification:TokenClassification",
        names.QUESTION_ANSWERING: "bertology_serve.tasks.question_answering:QuestionAnswering",
        names.MULTIPLE_CHOICE: "bertology_serve.tasks.multiple_choice:MultipleChoice",
        names.EMBEDDING: "bertology_serve.tasks.embedding:Embedding",
        names.ZERO_SHOT: "bertology_serve.tasks.zero_shot:ZeroShot",
        names.SPARSE: "bertology_serve.tasks.sparse_embedding:SparseEmbedding",
        names.MULTI_VECTOR: "bertology_serve.tasks.multi_vector:MultiVector",
    },
)
task_named = TASKS.named


def task_for(spec: TaskSpec) -> Task:
    """The task that a spec describes."""
    return task_named(spec.kind)(spec)
