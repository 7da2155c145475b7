"""What classification and regression share: one text or two, read as one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from bertology_serve.tasks.base import Example, Task
from bertology_serve.tasks.encoding import encode_text
from bertology_serve.tasks.fields import optional_text, read_text
from bertology_serve.tasks.spec import Encoding


@dataclass(frozen=True)
class TextExample(Example):
    """One text, or a text and its pair."""

    text: str
    text_pair: str | None


T = TypeVar("T", bound=TextExample)


class TextTask(Task[T]):
    """A task whose sequence is a text or a pair."""

    def encode(self, example: T, tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
        return [encode_text(tokenizer, example.text, example.text_pair, self.spec.max_length)]


def read_pair(record: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """``text`` and ``text_pair`` of a record; ``text_a`` and ``text_b`` mean the same."""
    text = read_text(record, where, "text", "text_a")
    return text, optional_text(record, where, "text_pair", "text_b")
