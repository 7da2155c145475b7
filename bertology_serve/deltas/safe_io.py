"""Reads files that may be hostile: sizes capped before reading, paths contained, JSON strict, safetensors only.

Every failure is a FormatError of one line that names the file. ``untrusted`` sees to that: whatever is made of a delta
directory is made inside it, and it is the only place that turns unexpected errors into the package's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from bertology_serve.errors import BertologyError, FormatError, InputError, Unsupported, about, one_line

DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Limits:
    """The most that a delta directory may ask of its reader, in bytes and in tensors a file."""

    json_bytes: int = 4 << 20
    header_bytes: int = 8 << 20
    tensors: int = 8192
    file_bytes: int = 8 << 30


@contextmanager
def untrusted(path: Path, what: str = "cannot be used") -> Iterator[None]:
    """Inside it something is made of what lies at ``path``; whatever that raises is an error of this package.

    InputError and Unsupported keep their type and name ``path`` in their message, other errors of the package pass as
    they are. An OSError, and anything that nobody foresaw, is a FormatError: ``what`` says what the path is then.
    """
    try:
        yield
    except (InputError, Unsupported) as error:
        raise about(error, str(path)) from None
    except BertologyError:
        raise
    except OSError as error:
        raise FormatError(f"cannot read {error.filename or path}: {_reason(error)}; check its permissions") from None
    except Exception as error:  # the one place: a hostile file raises what it likes in the libraries that read it
        raise FormatError(f"{path} {what}: {type(error).__name__}: {_reason(error)}; write or copy it again") from error


def read_bytes(path: Path, limit: int, root: Path) -> bytes:
    """A regular file of at most ``limit`` bytes whose real path lies under ``root``."""
    try:
        real, inside = os.path.realpath(path, strict=True), os.path.realpath(root, strict=True)
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read {path}: {_reason(error)}; expected a file of a delta directory") from None
    if not Path(real).is_relative_to(inside):
        raise FormatError(f"{path} points outside {root}, to {real}; copy the files themselves there (cp -rL)")
    return read_regular(Path(real), limit, str(path))


def read_regular(path: Path, limit: int, where: str) -> bytes:
    """A regular file of at most ``limit`` bytes. It never waits: pipes and devices are refused, not read.

    Raises FormatError, in which the file is called ``where``.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(number)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{where} is no regular file; expected one that holds what it should")
            if status.st_size > limit:
                raise FormatError(f"{where} has {status.st_size} bytes; at most {limit} are read")
            with open(number, "rb", closefd=False) as file:
                data = file.read(status.st_size + 1)
        finally:
            os.close(number)
    except OSError as error:
        raise FormatError(f"cannot read {where}: {_reason(error)}; check its permissions") from None
    if len(data) > status.st_size:
        raise FormatError(f"{where} has grown while it was read; try again when it is written")
    return data


def read_json(path: Path, limits: Limits, root: Path) -> tuple[dict[str, Any], bytes]:
    """A JSON object and the bytes that it was read from."""
    data = read_bytes(path, limits.json_bytes, root)
    return parse_json(data, str(path)), data


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object: UTF-8, no key twice, no NaN or Infinity."""
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {_reason(error)}; write the file again") from None
    if not isinstance(values, dict):
        raise FormatError(f"{where} holds a {type(values).__name__}; expected a JSON object")
    return values


def read_tensors(path: Path, limits: Limits, root: Path) -> tuple[dict[str, Tensor], str, int]:
    """The tensors of a safetensors file, their finite values checked; the file's SHA-256 (hex) and size in bytes."""
    data = read_bytes(path, limits.file_bytes, root)
    with untrusted(path, "is no valid safetensors file"):
        _check_header(data, path, limits)
        tensors = load_safetensors(data)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise FormatError(f"{path}: the tensor {name[:120]!r} holds NaN or infinity; train the delta again")
    return tensors, hashlib.sha256(data).hexdigest(), len(data)


def _check_header(data: bytes, path: Path, limits: Limits) -> None:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or (8 + size > len(data) and size <= limits.header_bytes):
        raise FormatError(f"{path} is truncated after {len(data)} bytes; copy it again")
    if size > limits.header_bytes:
        raise FormatError(f"{path} claims a header of {size} bytes; at most {limits.header_bytes} are read")
    table = parse_json(data[8 : 8 + size], f"the header of {path}")
    table.pop("__metadata__", None)
    if len(table) > limits.tensors:
        raise FormatError(f"{path} holds {len(table)} tensors; at most {limits.tensors} are read")
    end = 0
    for name, entry in table.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if dtype not in DTYPES:
            raise FormatError(f"{path}: tensor {name[:120]!r} has dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
        offsets = entry.get("data_offsets")
        if isinstance(offsets, list) and offsets and isinstance(offsets[-1], int):
            end = max(end, offsets[-1])
    if 8 + size + end > len(data):
        raise FormatError(f"{path} is truncated: {len(data)} bytes of {8 + size + end}; copy it again")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return values


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)
