"""JSON in and out. Whatever a body holds, reading it gives a value or a DataError."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from bertology_serve.errors import DataError

T = TypeVar("T")
encode = msgspec.json.Encoder().encode
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALF = re.compile(rb"%b(?!%b)|(?<!%b)%b" % (_HIGH, _LOW, _HIGH, _LOW))


def decode(body: bytes | memoryview, kind: type[T] | Any = Any) -> T:
    """The JSON of a body as ``kind``; keys that are not known are ignored."""
    if not body:
        raise DataError("the body is empty; expected JSON")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as problem:
        raise DataError(f"the body has the wrong shape: {problem}") from None
    except UnicodeDecodeError:
        raise DataError("the body is not UTF-8; JSON is sent as UTF-8") from None
    except msgspec.DecodeError as problem:
        half = _HALF.search(body)
        if half:  # msgspec says of these that the input was truncated
            raise DataError(
                f"the body holds {half[0].decode()}, half of a surrogate pair; send both or neither"
            ) from None
        raise DataError(f"the body is not JSON: {problem}") from None
    except RecursionError:
        raise DataError("the body is nested too deeply") from None


def shown(value: Any) -> str:
    """What a JSON value is, for error messages; its text is not repeated."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
