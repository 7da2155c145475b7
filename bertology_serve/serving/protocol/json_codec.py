"""JSON in and out. Whatever a body holds, reading it gives a value or a DataError."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from bertology_serve.errors import DataError, LimitError
from bertology_serve.files import JsonMapping, JsonObject

if TYPE_CHECKING:
    from bertology_serve.encoder.pipeline import Request

T = TypeVar("T")
encode = msgspec.json.Encoder().encode
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALF = re.compile(rb"%b(?!%b)|(?<!%b)%b" % (_HIGH, _LOW, _HIGH, _LOW))
SMALL = 32_768  # bytes of a body whose values need not be counted
MOST_VALUES, MOST_CONTAINERS = 131_072, 32_768  # in one body; the longest call that the queue takes holds fewer


def decode(body: bytes | memoryview, kind: type[T] | Any = Any) -> T:
    """The JSON of a body as ``kind``; keys that are not known are ignored.

    LimitError for a body of very many values: making objects of them stops all threads meanwhile.
    """
    if not body:
        raise DataError("the body is empty; expected JSON")
    if len(body) > SMALL:
        _check_values(bytes(body))
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as problem:
        raise DataError(f"the body has the wrong shape: {problem}") from None
    except UnicodeDecodeError:
        raise DataError("the body is not UTF-8; JSON is sent as UTF-8") from None
    except msgspec.DecodeError as problem:
        half = _HALF.search(body)
        if half:  # msgspec says of these that the input was truncated
            raise DataError(f"the body holds {half[0].decode()}, half of a surrogate pair; send both or none") from None
        raise DataError(f"the body is not JSON: {problem}") from None
    except RecursionError:
        raise DataError("the body is nested too deeply") from None


def object_of(body: bytes) -> JsonObject:
    """The JSON object of a body; DataError for anything else, LimitError as ``decode``."""
    value: Any = decode(body)
    if not isinstance(value, dict):
        raise DataError(f"the body is {shown(value)}; expected an object")
    return value


def flag(value: JsonMapping, name: str, default: bool = False, what: str = "field") -> bool:
    """A field that is true or false, or not there; DataError for anything else."""
    found = value.get(name)
    if found is not None and not isinstance(found, bool):
        raise DataError(f"{what} {name!r} is {shown(found)}; expected true or false")
    return default if found is None else found


def encode_list(values: Iterable[Any]) -> bytes:
    """A list as JSON, value by value: other threads run between them."""
    return b"[" + b",".join([encode(value) for value in values]) + b"]"


def _check_values(body: bytes) -> None:
    """Counts what separates values and opens lists and objects, first with what stands in texts, then without."""
    if _holds_few(body):
        return
    body = body.replace(rb"\\", b"").replace(rb"\"", b"")  # no quotes are left but those around texts
    if body.count(b'"') > 4 * MOST_VALUES or not _holds_few(b"".join(body.split(b'"')[::2])):
        raise LimitError(
            f"the body holds more than {MOST_VALUES} values, or {MOST_CONTAINERS} lists and objects; send several calls"
        )


def _holds_few(json: bytes) -> bool:
    return json.count(b",") <= MOST_VALUES and json.count(b"[") + json.count(b"{") <= MOST_CONTAINERS


def shown(value: Any) -> str:
    """What a JSON value is, for error messages; its text is not repeated."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def check_items(count: int, most: float) -> None:
    """LimitError for a call of more than ``most`` items; told before anything is made of them."""
    if count > most:
        raise LimitError(f"the call holds {count} items; at most {most} are taken, send several")


def check_sizes(requests: Sequence[Request], most_items: float, most: int) -> int:
    """The characters of all texts of a call's requests; LimitError as ``check_items`` and ``check_size``."""
    check_items(len(requests), most_items)
    return sum([check_size(request, most) for request in requests])


def check_size(request: Request, most: int) -> int:
    """The characters of a request's texts; LimitError when one field holds more than ``most`` of them."""
    total = 0
    for name, value in request.record.items():
        size = characters(value)
        if size > most:
            raise LimitError(
                f"{request.where}: field {name[:40]!r} holds {size} characters; at most {most} are taken, "
                "send a shorter text"
            )
        total += size
    return total


def characters(value: Any) -> int:
    """Characters of a text or of a list of texts, an item of the list counting as one at least; 0 for the rest."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(len(item) if isinstance(item, str) and item else 1 for item in value)
    return 0
