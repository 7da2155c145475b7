"""How a call wants vectors: cut to fewer dimensions, of unit length, as numbers, base64, bytes or bits."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.errors import DataError, Unsupported
from bertology_serve.tasks.fields import Record, kind_of, read_integer, read_list
from bertology_serve.tasks.spec import TaskSpec

FLOAT, BASE64 = "float", "base64"
FORMATS = (FLOAT, BASE64, "int8", "uint8", "binary", "ubinary")
VECTOR_FIELDS = ("dimensions", "normalize", "encoding_format")
MOST_DIMENSIONS = 100_000
Encoded = list[float] | list[int] | str
Vector = NDArray[np.float32]


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
        if spec.normalize and unit is False:
            raise Unsupported(f"{where}: this delta gives normalised embeddings; leave 'normalize' out")
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
        """The first dimensions of a vector [H] -> [D]."""
        return vector[: self.dimensions]

    def encoded(self, vector: Tensor, spec: TaskSpec) -> Encoded | dict[str, Encoded]:
        """A vector [D] that was cut, as the call wants it."""
        unit = spec.normalize if self.normalize is None else self.normalize
        scaled = F.normalize(vector, dim=0) if unit else vector
        found = {one: _encoded(vector.numpy(), scaled.numpy(), one, spec) for one in self.formats}
        return found if self.several else found[self.formats[0]]


AS_GIVEN = VectorForm()


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
