"""Tensors of the Open Inference Protocol: BYTES in, typed outputs out, as JSON or in the binary extension.

A binary tensor is appended to the JSON part; BYTES elements are a little-endian uint32 length and the bytes, row-major.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec
import numpy as np

from bertology_serve.errors import DataError, LimitError, Unsupported
from bertology_serve.files import JsonObject
from bertology_serve.serving.protocol.json_codec import MOST_VALUES, shown

Parameters = JsonObject
NOT_OFFERED = {
    "classification": "ask for the outputs label and scores",
    "shared_memory_region": "no shared memory is offered; send and take data in the call",
}
"""Parameters of a tensor that Triton takes and this server refuses, and what to do instead."""
_NUMPY = {"FP32": "<f4", "INT64": "<i8"}


def check_parameters(where: str, parameters: Parameters | None) -> None:
    """Unsupported for a tensor's parameter that would not be honoured."""
    for name, advice in NOT_OFFERED.items():
        if (parameters or {}).get(name) not in (None, False):
            raise Unsupported(f"{where}: parameter {name!r} is not supported; {advice}")


class InputTensor(msgspec.Struct):
    """One tensor of a request; ``data`` is missing where the binary part holds it. Raises what ``check_parameters``
    does.
    """

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters | None = None
    data: list[Any] | None = None

    def __post_init__(self) -> None:
        check_parameters(f"input {self.name[:80]!r}", self.parameters)


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of a response; ``data`` is flat, row-major."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Sequence[Any]

    def as_json(self) -> JsonObject:
        """With its data inside."""
        return {"name": self.name, "datatype": self.datatype, "shape": self.shape, "data": self.data}

    def as_binary(self) -> tuple[JsonObject, bytes]:
        """The JSON part, and the bytes to append."""
        if self.datatype == "BYTES":
            blob = b"".join(struct.pack("<I", len(raw)) + raw for raw in map(str.encode, self.data))
        else:
            blob = np.asarray(self.data, dtype=_NUMPY[self.datatype]).tobytes()
        part = {"name": self.name, "datatype": self.datatype, "shape": self.shape}
        return part | {"parameters": {"binary_data_size": len(blob)}}, blob


def read_texts(tensor: InputTensor, blob: bytes | None, most: int) -> list[list[str]]:
    """The rows of a BYTES tensor [n] or [n, k], each a list of its texts; empty ones at a row's end are padding.

    ``blob`` is the tensor's part of the binary extension. Raises DataError, LimitError beyond ``most`` elements a side.
    """
    where = f"input {tensor.name!r}"
    if tensor.datatype != "BYTES":
        raise DataError(f"{where}: datatype is {tensor.datatype!r}; expected BYTES")
    if len(tensor.shape) not in (1, 2) or min(tensor.shape) < 0:
        raise DataError(f"{where}: shape is {tensor.shape[:8]}; expected [n] or [n, k]")
    if max(tensor.shape) > most:
        raise LimitError(f"{where}: shape is {tensor.shape}; at most {most} rows and {most} columns are taken")
    count = math.prod(tensor.shape)
    if count > MOST_VALUES:
        raise LimitError(f"{where}: shape {tensor.shape} means {count} elements; at most {MOST_VALUES} are taken")
    if blob is not None and tensor.data is not None:
        raise DataError(f"{where}: it has data in the JSON and in binary; send one of them")
    flat = _flat(tensor.data, tensor.shape, where) if blob is None else list(islice(_elements(blob, where), count + 1))
    if len(flat) != count:
        raise DataError(f"{where}: shape {tensor.shape} means {count} elements, but the data has {len(flat)}")
    width = tensor.shape[1] if len(tensor.shape) == 2 else 1
    rows = [flat[at : at + width] for at in range(0, count, width)] if width else [[] for _ in range(tensor.shape[0])]
    return [_unpadded(row) for row in rows]


def split(tensors: Sequence[InputTensor], binary: bytes) -> list[bytes | None]:
    """Each tensor's part of the binary bytes, ``None`` for tensors whose data is in the JSON."""
    parts: list[bytes | None] = []
    at = 0
    for tensor in tensors:
        size = (tensor.parameters or {}).get("binary_data_size")
        if size is None:
            parts.append(None)
            continue
        if isinstance(size, bool) or not isinstance(size, int) or size < 0 or at + size > len(binary):
            raise DataError(
                f"input {tensor.name!r}: binary_data_size is {size}, but {len(binary) - at} binary bytes are left"
            )
        parts.append(binary[at : at + size])
        at += size
    if at != len(binary):
        raise DataError(f"{len(binary) - at} binary bytes belong to no input; expected binary_data_size to name them")
    return parts


def _elements(blob: bytes, where: str) -> Iterator[str]:
    at = 0
    while at < len(blob):
        if at + 4 > len(blob):
            raise DataError(f"{where}: the binary data ends inside an element's length")
        (size,) = struct.unpack_from("<I", blob, at)
        at += 4 + size
        if at > len(blob):
            raise DataError(f"{where}: an element of {size} bytes does not fit into its binary data")
        yield _text(blob[at - size : at], where)


def _flat(data: list[Any] | None, shape: Sequence[int], where: str) -> list[str]:
    """Flat texts, or rows of them as the shape says, as one list in row-major order."""
    if data is None:
        raise DataError(f"{where}: there is no data; expected a list of texts or the binary extension")
    if any(isinstance(item, list) for item in data):
        width = shape[1] if len(shape) == 2 else 1
        if len(data) != shape[0] or not all(isinstance(item, list) and len(item) == width for item in data):
            raise DataError(f"{where}: data is nested otherwise than shape {list(shape)}; expected rows of {width}")
        data = [element for item in data for element in item]
    for item in data:
        if not isinstance(item, str):
            raise DataError(f"{where}: an element is {shown(item)}; expected texts")
    return data


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise DataError(f"{where}: an element is not UTF-8; expected texts") from None


def _unpadded(row: list[str]) -> list[str]:
    end = len(row)
    while end and not row[end - 1]:
        end -= 1
    return row[:end]
