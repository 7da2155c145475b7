"""What the server says, typed: read by the client, described by the OpenAPI document. Light: msgspec only.

A task's ``decode`` gives the fields of an ``Answer`` that are its own; those that a task does not have are ``None``.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Logits = list[float | list[float | list[float]]]  # of each label, of each token or window


class Entity(Struct, frozen=True, omit_defaults=True):
    """One entity; offsets are characters of the text sent, or of the tokens joined by one space.

    Those in UTF-16 units are there where a call asks for ``"offsets": "utf16"``.
    """

    label: str
    start: int
    end: int
    text: str
    score: float
    start_utf16: int | None = None
    end_utf16: int | None = None


class Span(Struct, frozen=True, omit_defaults=True):
    """One answer to a question; offsets are characters of the context, as those of entities."""

    text: str
    start: int
    end: int
    score: float
    start_utf16: int | None = None
    end_utf16: int | None = None


class RedactedSpan(Struct, frozen=True, omit_defaults=True):
    """A part of a text and what stands in its place; offsets are those of the text sent."""

    label: str
    start: int
    end: int
    text: str
    replacement: str
    start_utf16: int | None = None
    end_utf16: int | None = None


class Chunk(Struct, frozen=True, omit_defaults=True):
    """The vector of a part of a text; offsets are characters."""

    start: int
    end: int
    embedding: tuple[float, ...] | str | None = None
    embeddings: dict[str, tuple[float, ...] | str] | None = None


class Weight(Struct, frozen=True, omit_defaults=True):
    """The weight of one word of the vocabulary."""

    index: int
    value: float
    token: str | None = None


class Answer(Struct, frozen=True, omit_defaults=True):
    """One answer: ``label`` (None where the delta abstains) or, where several may apply, ``labels``, with ``scores``
    (classification, multi-label), ``value`` (regression), ``entities`` (tokens), ``answer``
    (questions), ``choice`` with ``scores`` (multiple choice), ``embedding``, ``sparse``, ``vectors`` with their
    ``tokens``; and the version that gave it.
    """

    delta: str
    version: str
    task: str
    id: Annotated[str | int | None, Meta(description="The request's own.")] = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    score: float | None = None
    scores: dict[str, float] | list[float] | None = None
    value: float | None = None
    entities: tuple[Entity, ...] | None = None
    tags: tuple[str, ...] | None = None
    redacted: Annotated[str | None, Meta(description="The text as the call's redact and patterns have it.")] = None
    redactions: tuple[RedactedSpan, ...] | None = None
    placeholders: Annotated[
        dict[str, str] | None, Meta(description="What each placeholder stands for, where the policy is replace.")
    ] = None
    answer: Span | None = None
    answers: tuple[Span, ...] | None = None
    choice: int | None = None
    embedding: Annotated[
        tuple[float, ...] | str | None, Meta(description="Numbers, or base64 of little-endian float32.")
    ] = None
    embeddings: Annotated[
        dict[str, tuple[float, ...] | str] | None, Meta(description="By type, where embedding_types are asked for.")
    ] = None
    embedding_pair: tuple[float, ...] | str | dict[str, tuple[float, ...] | str] | None = None
    embedding_negatives: tuple[tuple[float, ...] | str | dict[str, tuple[float, ...] | str], ...] | None = None
    chunks: tuple[Chunk, ...] | None = None
    sparse: tuple[Weight, ...] | None = None
    sparse_pair: tuple[Weight, ...] | None = None
    sparse_negatives: tuple[tuple[Weight, ...], ...] | None = None
    vectors: tuple[tuple[float, ...], ...] | None = None
    vectors_pair: tuple[tuple[float, ...], ...] | None = None
    vectors_negatives: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    tokens: tuple[str, ...] | None = None
    similarity: float | None = None
    logits: Annotated[Logits | None, Meta(description="The head's raw output, where it was asked for.")] = None
    truncated: Annotated[bool, Meta(description="The text was cut to the delta's maximum length.")] = False
    tokens_read: Annotated[int | None, Meta(description="Tokens that were read; given where truncated.")] = None
    tokens_given: Annotated[int | None, Meta(description="Tokens of the whole text; given where truncated.")] = None
    windows: Annotated[int | None, Meta(description="Windows that a long text was read in; given where several.")] = (
        None
    )


class SeveralAnswers(Struct, omit_defaults=True):
    """The answers of several deltas to one item, by their names."""

    deltas: dict[str, Answer]
    id: Annotated[str | int | None, Meta(description="The request's own.")] = None


class Model(Struct, frozen=True):
    """A delta that answers."""

    name: str
    version: str
    task: str
    labels: tuple[str, ...]
    kinds: tuple[str, ...]
    max_length: int
    bytes: int
    metrics: dict[str, float | None]
    pairs: Annotated[bool, Meta(description="It reads pairs of texts alone.")] = False


class Reconciled(Struct, frozen=True):
    """Why which deltas are not as the desired state wants them; empty where all are."""

    failed: dict[str, str]


class Version(Struct, frozen=True):
    """One version on the server's disk or in its memory; ``state`` is READY, UNAVAILABLE, LOADING or UNLOADING.

    ``reason``: why it is not ready.
    """

    name: str
    version: str
    state: str
    reason: str = ""
