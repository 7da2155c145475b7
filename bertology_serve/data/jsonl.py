"""JSON lines, and JSON files that hold one list of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from bertology_serve.data.lines import read_lines
from bertology_serve.errors import DataError


def read(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(object, where) of each line that is not blank; of each item when the file starts with ``[``."""
    lines = ((number, line) for number, line in read_lines(path) if not line.isspace())
    first = next(lines, None)
    if first is not None and first[1].lstrip().startswith("["):
        items = parse("".join(line for _, line in chain([first], lines)), str(path))
        for row, item in enumerate(items, 1):
            yield _object(item, f"{path}:{row}"), f"{path}:{row}"
        return
    for number, line in chain([first] if first else [], lines):
        yield _object(parse(line, f"{path}:{number}"), f"{path}:{number}"), f"{path}:{number}"


def parse(text: str, where: str, expected: str = "one JSON object a line") -> Any:
    """The JSON value of a text; DataError when it is malformed or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply; expected {expected}") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); expected {expected}") from None


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where}: a JSON {type(value).__name__}; expected an object such as {{"text": ...}}')
    return value
