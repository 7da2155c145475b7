"""Reading fields of a record. Whatever is wrong is a DataError that names the place and the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bertology_serve.errors import DataError, nearest
from bertology_serve.tasks.spec import IGNORED

Record = Mapping[str, Any]
EMPTY = "is missing (it is null, or an empty cell)"


def required(record: Record, where: str, name: str, expected: str) -> Any:
    """The value of a field that is there and not null."""
    value = record.get(name)
    if value is None and name in record:
        raise DataError(f"{where}: field {name!r} {EMPTY}; expected {expected}")
    if value is None:
        keys = ", ".join(sorted(map(str, record))) or "none"
        raise DataError(f"{where}: field {name!r} is missing; expected {expected} (fields found: {keys})")
    return value


def read_text(record: Record, where: str, name: str, *aliases: str) -> str:
    """A text with at least one character that is not white space, under its name or an alias."""
    value = optional_text(record, where, name, *aliases)
    if value is None:
        required(record, where, next((key for key in (name, *aliases) if key in record), name), "a text")
    return str(value)


def optional_text(record: Record, where: str, name: str, *aliases: str) -> str | None:
    """The same, or None when the field is absent or null. Refuses a record that holds both a name and its alias."""
    found = [key for key in (name, *aliases) if record.get(key) is not None]
    if not found:
        return None
    if len(found) > 1:
        raise DataError(f"{where}: fields {found[0]!r} and {found[1]!r} mean the same; give one of them")
    return check_text(record[found[0]], where, found[0])


def check_text(value: Any, where: str, name: str) -> str:
    """``value`` if it is a text that can be tokenised."""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} is {kind_of(value)}; expected a text")
    if not value or value.isspace():
        raise DataError(f"{where}: field {name!r} is {'only white space' if value else 'empty'}; expected a text")
    return _whole(value, where, name)


def _whole(text: str, where: str, name: str) -> str:
    """A text if UTF-8 can hold it: JSON may name half of a surrogate pair, which no file and no tokenizer takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            half = ascii(text[problem.start])
            raise DataError(
                f"{where}: field {name!r} holds {half}, half of a surrogate pair (was a text cut inside a character?); "
                "expected both halves, or neither"
            ) from None
    return text


def read_texts(record: Record, where: str, name: str, least: int, most: int) -> tuple[str, ...]:
    """A list of ``least`` to ``most`` texts."""
    value = read_list(record, where, name)
    if not least <= len(value) <= most:
        raise DataError(f"{where}: field {name!r} has {len(value)} items; expected {least} to {most}")
    return tuple(check_text(item, where, f"{name}[{index}]") for index, item in enumerate(value))


def read_list(record: Record, where: str, name: str) -> list[Any]:
    """A list; arrays that Parquet readers give are lists too."""
    value = required(record, where, name, "a list")
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise DataError(f"{where}: field {name!r} is {kind_of(value)}; expected a list")
    return list(value)


def read_label(value: Any, where: str, name: str) -> str:
    """A class name. Integers and integral floats become their digits, booleans ``true`` and ``false``."""
    if value is None:
        raise DataError(f"{where}: field {name!r} {EMPTY}; expected a label")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return _whole(value.strip(), where, name)
    raise DataError(f"{where}: field {name!r} is {kind_of(value)}; expected a label (a name or an integer)")


def read_class(record: Record, where: str) -> str:
    """The class of a whole record under ``label``; a record without one (-100) is refused."""
    label = read_label(required(record, where, "label", "a label"), where, "label")
    if label == str(IGNORED):
        raise DataError(f"{where}: field 'label' is {IGNORED}, which means that there is no label; leave such rows out")
    return label


def read_tags(record: Record, where: str) -> list[str | None]:
    """The class of each word under ``tags``; None for words that have none (-100, as torch and HuggingFace write)."""
    tags = [read_label(tag, where, f"tags[{index}]") for index, tag in enumerate(read_list(record, where, "tags"))]
    return [None if tag == str(IGNORED) else tag for tag in tags]


def label_index(label: str, known: Mapping[str, int], where: str, name: str) -> int:
    """The index of a label among the known ones."""
    if label not in known:
        raise DataError(
            f"{where}: field {name!r} has the unknown label {label!r}; {nearest(label, known)}; train with --labels to "
            "name labels that the training data lacks"
        )
    return known[label]


def read_score(record: Record, where: str) -> float:
    """A finite number under ``score``, or under ``label`` when there is no score; digits in a text count."""
    name = "label" if record.get("score") is None and record.get("label") is not None else "score"
    value = required(record, where, name, "a number")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: field {name!r} is {kind_of(value)}; expected a finite number")
    return number


def read_integer(record: Record, where: str, name: str, least: int, most: int) -> int:
    """An integer from ``least`` to ``most``; digits in a text and integral floats count."""
    value = required(record, where, name, f"an integer from {least} to {most}")
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    digits = isinstance(value, str) and len(value) < 20 and value.strip().isdecimal()
    if isinstance(value, bool) or not (whole or digits) or not least <= int(value) <= most:
        raise DataError(f"{where}: field {name!r} is {kind_of(value)}; expected an integer from {least} to {most}")
    return int(value)


def sorted_labels(labels: set[str]) -> tuple[str, ...]:
    """Labels in an order that depends on nothing else: by value, then name, when all are integers, else by name."""
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def kind_of(value: Any) -> str:
    """A value for an error message: what it is and, cut short, what it says."""
    if value is None:
        return "null"
    shown = repr(value)
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    return f"{shown} ({type(value).__name__})"
