"""How a call wants vectors: of parts of a text, cut to fewer dimensions, as numbers, base64, bytes or bits."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.errors import DataError, LimitError, Unsupported
from bertology_serve.tasks.encoding import own_rows
from bertology_serve.tasks.fields import Record, kind_of, read_integer, read_list
from bertology_serve.tasks.spec import EMBEDDING, Encoding, TaskSpec

FLOAT, BASE64 = "float", "base64"
FORMATS = (FLOAT, BASE64, "int8", "uint8", "binary", "ubinary")
PROMPT_FIELDS = ("prompt_name", "input_type")
VECTOR_FIELDS = ("dimensions", "normalize", "encoding_format")
MOST_DIMENSIONS, MOST_TOKENS, MOST_CHUNKS = 100_000, 1_000_000, 1024
Encoded = list[float] | list[int] | str
Vector = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class VectorForm:
    """Vectors cut to ``dimensions``, in each of ``formats``; ``several``: under their names.

    ``normalize`` says whether they have length 1; None: as the delta has it.
    """

    dimensions: int | None = None
    normalize: bool | None = None
    formats: tuple[str, ...] = (FLOAT,)
    several: bool = False

    @classmethod
    def read(cls, record: Record, where: str, spec: TaskSpec) -> VectorForm:
        """What a record asks for. Raises DataError; Unsupported for vectors that a delta does not have: those as they
        were before they were normalised, and bytes where no ranges were found in training.
        """
        named = {name: record.get(name) for name in (*VECTOR_FIELDS, "embedding_types")}
        if not any(value is not None for value in named.values()):
            return AS_GIVEN
        unit = named["normalize"]
        if unit is not None and not isinstance(unit, bool):
            raise DataError(f"{where}: field 'normalize' is {kind_of(unit)}; expected true or false")
        if spec.unit and unit is False:
            raise Unsupported(f"{where}: this delta gives normalised embeddings; leave 'normalize' out")
        alien = next((name for name, value in named.items() if value is not None and name != "normalize"), None)
        if alien and spec.kind != EMBEDDING:
            raise Unsupported(f"{where}: field {alien!r} is not supported for {spec.kind}; leave it out")
        several = named["embedding_types"] is not None
        formats = read_list(record, where, "embedding_types") if several else [named["encoding_format"]]
        formats = [FLOAT] if formats == [None] and not several else formats
        for one in formats or [None]:
            if one not in FORMATS:
                field = "embedding_types" if several else "encoding_format"
                raise DataError(f"{where}: field {field!r} has {kind_of(one)}; expected {', '.join(FORMATS)}")
        if not spec.ranges and {"int8", "uint8"} & {*map(str, formats)}:
            raise Unsupported(
                f"{where}: this delta has no ranges for int8 and uint8, which training finds; ask for float, base64, "
                "binary or ubinary"
            )
        dimensions = named["dimensions"]
        if dimensions is not None:
            dimensions = read_integer(record, where, "dimensions", 1, MOST_DIMENSIONS)
        return cls(dimensions, unit, tuple(dict.fromkeys(map(str, formats))), several)

    def check(self, width: int, spec: TaskSpec, where: str) -> None:
        """Raises DataError where vectors of that width cannot be cut so, or have other ranges."""
        if {"int8", "uint8"} & {*self.formats} and len(spec.ranges[0]) != width:
            raise DataError(f"{where}: this delta has ranges of {len(spec.ranges[0])} dimensions; expected {width}")
        if (self.dimensions or 0) > width:
            raise DataError(f"{where}: option 'dimensions' is {self.dimensions}; the embedding has {width}")

    def cut(self, vector: Tensor) -> Tensor:
        """The first dimensions of a vector [..., H] -> [..., D]."""
        return vector[..., : self.dimensions]

    def encoded(self, vector: Tensor, spec: TaskSpec) -> Encoded | dict[str, Encoded]:
        """A vector [D] that was cut, or several [n, D], as the call wants them."""
        unit = spec.unit if self.normalize is None else self.normalize
        has_it = spec.unit and self.dimensions is None
        scaled = F.normalize(vector, dim=-1) if unit and not has_it else vector
        found = {one: _encoded(vector.detach().numpy(), scaled.detach().numpy(), one, spec) for one in self.formats}
        return found if self.several else found[self.formats[0]]


AS_GIVEN = VectorForm()


@dataclass(frozen=True)
class Chunks:
    """The parts of a text that get a vector each: ``spans`` of characters, or as many tokens each as ``size``."""

    spans: tuple[tuple[int, int], ...] = ()
    size: int = 0

    @classmethod
    def read(cls, record: Record, where: str, spec: TaskSpec) -> Chunks | None:
        """What a record asks for; None: one vector of the whole text. Raises DataError; Unsupported where a delta takes
        no mean of its rows; LimitError for too many chunks.
        """
        pooling, spans, size = (record.get(name) for name in ("pooling", "chunks", "chunk_tokens"))
        if pooling == "chunks" and spec.kind != EMBEDDING:
            raise Unsupported(f"{where}: field 'pooling' is not supported for {spec.kind}; leave it out")
        if pooling not in (None, "chunks", spec.pooling):
            raise DataError(f"{where}: field 'pooling' is {kind_of(pooling)}; expected 'chunks', or nothing")
        if pooling != "chunks":
            if spans is not None or size is not None:
                raise DataError(f"{where}: there are chunks; send 'pooling': 'chunks' with them")
            return None
        if spec.pooling != "mean":
            raise Unsupported(f"{where}: this delta's pooling is {spec.pooling}; chunks need a mean of rows")
        if (spans is None) == (size is None):
            raise DataError(f"{where}: expected either 'chunks', [start, end] of each, or 'chunk_tokens', a number")
        if spans is None:
            return cls(size=read_integer(record, where, "chunk_tokens", 1, MOST_TOKENS))
        listed = read_list(record, where, "chunks")
        if len(listed) > MOST_CHUNKS:
            raise LimitError(f"{where}: there are {len(listed)} chunks; at most {MOST_CHUNKS} are taken")
        found = list[tuple[int, int]]()
        for number, span in enumerate(listed or [None]):
            if not isinstance(span, list | tuple) or len(span) != 2 or any(type(end) is not int for end in span):
                raise DataError(f"{where}: chunks[{number}] is {kind_of(span)}; expected [start, end] in characters")
            found.append((span[0], span[1]))
        return cls(tuple(found))

    def tokens(
        self, encodings: Sequence[Encoding], prompt: int, characters: int, spec: TaskSpec, where: str
    ) -> ChunkTokens:
        """Where each chunk's tokens are. The text stands behind ``prompt`` characters, none of whose tokens is any
        chunk's; a token is that chunk's in which it begins.

        Raises DataError for a chunk outside the text or without a token that is read, LimitError for too many.
        """
        rows = own_rows(encodings, spec.stride)
        offsets = [one.offsets[row] for one, own in zip(encodings, rows, strict=True) for row in own]
        starts, ends = (np.array([span[side] for span in offsets], np.int64) - prompt for side in (0, 1))
        [places] = np.nonzero((starts >= 0) & (ends > starts))
        starts, ends = np.maximum.accumulate(starts[places]), np.maximum.accumulate(ends[places])
        if self.size:
            first = np.arange(0, len(places), self.size)
            last = np.minimum(first + self.size, len(places))
            spans = list(zip(starts[first].tolist(), ends[last - 1].tolist(), strict=True))
            if len(spans) > MOST_CHUNKS:
                raise LimitError(
                    f"{where}: there are {len(spans)} chunks; at most {MOST_CHUNKS} are given, ask for larger"
                )
            return ChunkTokens(rows, places, spans, first, last)
        first, last = (np.searchsorted(starts, [span[side] for span in self.spans]) for side in (0, 1))
        for number, (start, end) in enumerate(self.spans):
            this = f"{where}: chunks[{number}] is [{start}, {end}]"
            if not 0 <= start < end <= characters:
                raise DataError(f"{this}; expected a part of the text's {characters} characters")
            if first[number] == last[number]:
                raise DataError(f"{this}, in which no token begins that is read; leave it out")
        return ChunkTokens(rows, places, list(self.spans), first, last)


class ChunkTokens(NamedTuple):
    """``rows`` of each window that belong to it; ``places`` among all those that are the text's; ``spans`` of the
    chunks in characters, and which of the places are each one's, from ``first`` to before ``last``.
    """

    rows: list[list[int]]
    places: Ints
    spans: list[tuple[int, int]]
    first: Ints
    last: Ints

    def means(self, outputs: Sequence[Tensor]) -> Tensor:
        """The mean row of each chunk, float32 [N, H], from the rows of each window; the work does not grow with chunks
        that overlap.
        """
        hidden = torch.cat([out[own] for out, own in zip(outputs, self.rows, strict=True)])[self.places]
        sums = F.pad(hidden.double().cumsum(0), (0, 0, 1, 0))
        counts = torch.from_numpy(self.last - self.first)
        return ((sums[self.last] - sums[self.first]) / counts[:, None]).float()


def _encoded(vector: Vector, scaled: Vector, form: str, spec: TaskSpec) -> Encoded:
    """Codes are those of the vector before it is scaled anew: the first ones of a longer vector's, and its bits."""
    if form == FLOAT:
        return scaled.tolist()  # type: ignore[no-any-return]
    if form == BASE64:
        return base64.b64encode(scaled.astype("<f4").tobytes()).decode()
    codes = np.packbits(vector > 0) if form.endswith("binary") else in_ranges(vector, spec.ranges)
    return (codes.astype(np.int16) - (0 if form.startswith("u") else 128)).tolist()  # type: ignore[no-any-return]


def in_ranges(vector: Vector, ranges: tuple[tuple[float, ...], ...]) -> NDArray[np.uint8]:
    """Which of 256 equal steps from the least to the greatest value of its dimension each number [D] is in, as
    sentence-transformers' ``quantize_embeddings`` has it for uint8; for int8 less 128.
    """
    low, high = np.array(ranges, np.float32)[:, : len(vector)]
    steps = (high - low) / np.float32(255)
    codes: NDArray[np.uint8] = np.clip(np.floor((vector - low) / np.where(steps == 0, 1, steps)), 0, 255).astype(
        np.uint8
    )
    return codes
