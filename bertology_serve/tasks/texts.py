"""What classification and regression share: one text or two, read as one sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from typing_extensions import TypeVar

from bertology_serve.errors import DataError
from bertology_serve.tasks.base import Example, Task
from bertology_serve.tasks.encoding import encode_text
from bertology_serve.tasks.fields import optional_text, read_text
from bertology_serve.tasks.spec import CLASSIFICATION, REGRESSION, Encoding


@dataclass(frozen=True)
class TextExample(Example):
    """One text, or a text and its pair."""

    text: str
    text_pair: str | None


T = TypeVar("T", bound=TextExample)


class TextTask(Task[T]):
    """A task whose sequence is a text or a pair."""

    def texts(self, record: Mapping[str, Any], where: str) -> tuple[str, str | None]:
        """The texts of a record; raises DataError for a single one where the spec says pairs."""
        text, pair = read_pair(record, where)
        if self.spec.pairs and pair is None:
            raise DataError(f"{where}: field 'text_pair' is missing; this delta was trained on pairs of texts")
        return text, pair

    def encode(self, example: T, tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
        return [encode_text(tokenizer, example.text, example.text_pair, self.spec.max_length)]


def all_pairs(kind: str, records: Iterable[tuple[Mapping[str, Any], str]]) -> bool:
    """The ``TaskSpec.pairs`` of (fields, where) records that a task of that kind is trained on."""
    if kind not in (CLASSIFICATION, REGRESSION):
        return False
    return all(optional_text(fields, where, "text_pair", "text_b") is not None for fields, where in records)


def read_pair(record: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """``text`` and ``text_pair`` of a record; ``text_a`` and ``text_b`` mean the same."""
    text = read_text(record, where, "text", "text_a")
    return text, optional_text(record, where, "text_pair", "text_b")
