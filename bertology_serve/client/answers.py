"""What the server says, typed. Fields that a task does not have are ``None``."""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class Entity(Struct, frozen=True):
    """One entity; offsets are characters of the text sent, or of the tokens joined by one space."""

    label: str
    start: int
    end: int
    text: str
    score: float


class Span(Struct, frozen=True):
    """One answer to a question; offsets are characters of the context."""

    text: str
    start: int
    end: int
    score: float


class Answer(Struct, frozen=True):
    """One answer: ``label`` (None where the delta abstains) or ``labels`` with
    ``scores`` (classification, multi-label), ``value`` (regression), ``entities`` (tokens), ``answer``
    (questions), ``choice`` with ``scores`` (multiple choice), ``embedding``; and the version that gave it.

    Where the text was longer than the delta reads, ``truncated`` is true, ``tokens_read`` and ``tokens_given`` say how
    much of it counted.
    """

    delta: str
    version: str
    task: str
    id: str | int | None = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    score: float | None = None
    scores: dict[str, float] | list[float] | None = None
    value: float | None = None
    entities: tuple[Entity, ...] | None = None
    tags: tuple[str, ...] | None = None
    answer: Span | None = None
    answers: tuple[Span, ...] | None = None
    choice: int | None = None
    embedding: tuple[float, ...] | None = None
    embedding_pair: tuple[float, ...] | None = None
    similarity: float | None = None
    logits: Any = None
    truncated: bool = False
    tokens_read: int | None = None
    tokens_given: int | None = None


class Model(Struct, frozen=True):
    """A delta that answers."""

    name: str
    version: str
    task: str
    labels: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    max_length: int = 0
    bytes: int = 0
    metrics: dict[str, float | None] = {}


class Version(Struct, frozen=True):
    """One version on the server's disk or in its memory; ``state`` is READY, UNAVAILABLE, LOADING or UNLOADING."""

    name: str
    version: str
    state: str
    reason: str = ""
