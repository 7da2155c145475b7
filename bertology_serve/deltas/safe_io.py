"""Reads files that may be hostile: sizes capped before reading, paths contained, JSON strict, safetensors only.

Every failure is a FormatError of one line that names the file. ``untrusted`` sees to that: whatever is made of a delta
directory is made inside it, and it is the only place that turns unexpected errors into the package's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from bertology_serve.errors import (
    BertologyError,
    FormatError,
    InputError,
    SpecError,
    Unsupported,
    about,
    nearest,
    one_line,
)
from bertology_serve.files import JsonObject

if TYPE_CHECKING:
    from torch import Tensor

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


def read_json(path: Path, limits: Limits, root: Path) -> tuple[JsonObject, bytes]:
    """A JSON object and the bytes that it was read from."""
    data = read_bytes(path, limits.json_bytes, root)
    return parse_json(data, str(path)), data


def parse_json(data: bytes, where: str) -> JsonObject:
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
    import torch  # not for those who read JSON alone
    from safetensors.torch import load as load_safetensors

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


def _once(pairs: list[tuple[str, object]]) -> JsonObject:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return values


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is no JSON number")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)


T = TypeVar("T")
_LARGEST = 2**53  # beyond it JSON readers disagree
_JSON_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def build(cls: type[T], values: object, where: str) -> T:
    """An instance of the dataclass ``cls``; raises FormatError naming the field, what it holds and what it should."""
    table = as_object(values, where)
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    check_keys(table, known, where)
    needed = (f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING)
    lacking = [name for name in needed if name not in table]
    if lacking:
        raise FormatError(f"{where} lacks the field {lacking[0]!r}; write the file again")
    hints = _hints(cls)  # type: ignore[arg-type]  # classes are hashable
    checked = {name: conform(value, hints[name], f"{where}.{name}") for name, value in table.items()}
    try:
        return cls(**checked)
    except (SpecError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: {error}") from None


_hints = cache(get_type_hints)  # a fifth of reading a small delta


def as_object(values: object, where: str) -> JsonObject:
    """``values`` if it is a JSON object."""
    if not isinstance(values, dict):
        raise FormatError(f"{where} is {_shown(values)}; expected an object")
    return values


def check_keys(table: JsonObject, known: Mapping[str, object], where: str) -> None:
    """Raises FormatError for a key that is not known, naming the nearest that is."""
    for name in table:
        if name not in known:
            raise FormatError(f"{where} has an unknown field {name[:80]!r}; {nearest(name[:80], known)}")


def conform(value: object, hint: Any, where: str) -> Any:
    """``value`` as the annotation ``hint`` has it (lists become tuples, whole numbers floats where floats are due)."""
    if get_origin(hint) in (Union, types.UnionType):
        hints = get_args(hint)
        optional = value is None and type(None) in hints
        return None if optional else conform(value, next(own for own in hints if own is not type(None)), where)
    if get_origin(hint) is tuple:
        return _conform_tuple(value, get_args(hint), where)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if hint is float and abs(value) < 1e300:
            return float(value)
        if hint is int and isinstance(value, int) and abs(value) < _LARGEST:
            return value
    elif hint in (str, bool, type(None)) and isinstance(value, hint):
        return value
    raise FormatError(f"{where} is {_shown(value)}; expected {_JSON_NAMES[hint]}")


def _conform_tuple(value: object, hints: tuple[object, ...], where: str) -> tuple[object, ...]:
    if not isinstance(value, list | tuple):
        raise FormatError(f"{where} is {_shown(value)}; expected a list")
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(hints) != len(value):
        raise FormatError(f"{where} has {len(value)} entries; expected {len(hints)}")
    return tuple(conform(item, hint, f"{where}[{i}]") for i, (item, hint) in enumerate(zip(value, hints, strict=True)))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
