"""Reading fields of a record. Whatever is wrong is a DataError that names the place and the field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bertology_serve.errors import DataError, Unsupported, nearest
from bertology_serve.tasks.spec import EMBEDDING, IGNORED, QUESTION_ANSWERING, TOKEN_CLASSIFICATION, VECTOR_KINDS

Record = Mapping[str, object]
Fields = Mapping[str, Any]
Records = Iterable[tuple[Record, str]]
"""Fields, and where they stand."""
NO_LABEL = str(IGNORED)
EMPTY = "is missing (it is null, or an empty cell)"


def required(record: Record, where: str, name: str, expected: str) -> object:
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


def check_text(value: object, where: str, name: str) -> str:
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


def read_list(record: Record, where: str, name: str) -> list[object]:
    """A list; arrays that Parquet readers give are lists too."""
    return as_list(required(record, where, name, "a list"), where, name)


def as_list(value: object, where: str, name: str) -> list[object]:
    """The items of a list or an array."""
    found = _items(value)
    if found is None:
        raise DataError(f"{where}: field {name!r} is {kind_of(value)}; expected a list")
    return found


def _items(value: object) -> list[object] | None:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else None


def read_label(value: object, where: str, name: str) -> str:
    """A class name. Integers and integral floats become their digits, booleans ``true`` and ``false``."""
    value = _plain(value)
    if value is None:
        raise DataError(f"{where}: field {name!r} {EMPTY}; expected a label")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value.strip():
        text = _whole(value.strip(), where, name)
        return NO_LABEL if spelled(text) == NO_LABEL else text
    raise DataError(f"{where}: field {name!r} is {kind_of(value)}; expected a label (a name or an integer)")


def _plain(value: object) -> object:
    """A value; what numpy holds as Python does."""
    return value.tolist() if hasattr(value, "tolist") else value


def spelled(label: str) -> str:
    """A label as it is spelled whatever file it stood in: ``True`` (CSV) as ``true``, ``1.0`` (pandas) as ``1``."""
    text = _INTEGRAL.sub(r"\1", label)
    return text.lower() if text.lower() in ("true", "false") else text


def known_label(label: str, known: Mapping[str, Any], where: str, name: str) -> str:
    """The known label that a record means: that of its name, else the only one that is spelled alike."""
    if label in known:
        return label
    alike = [own for own in known if spelled(own) == spelled(label)]
    if len(alike) != 1:
        raise DataError(
            f"{where}: field {name!r} has the unknown label {label!r}; {nearest(label, known)}; train with --labels to "
            "name labels that the training data lacks"
        )
    return alike[0]


def read_class(record: Record, where: str) -> tuple[str, dict[str, float]]:
    """The class of a whole record under ``label``, and the shares of several where it has them.

    ``{"a": 3, "b": 1}`` (annotators' votes, or probabilities; as JSON in a cell) is mostly ``a``, by three quarters. A
    record without a class (-100) is refused.
    """
    value = _opened(required(record, where, "label", "a label"))
    if isinstance(value, Mapping):
        shares = {read_label(name, where, "label"): _share(share) for name, share in value.items()}
        total = sum(shares.values())
        if not all(share >= 0 for share in shares.values()) or not 0 < total < math.inf:
            raise DataError(f"{where}: field 'label' is {kind_of(value)}; expected a label, or the share of each")
        return max(shares, key=shares.__getitem__), {name: share / total for name, share in shares.items()}
    label = read_label(value, where, "label")
    if label == NO_LABEL:
        raise DataError(f"{where}: field 'label' is {IGNORED}, which means that there is no label; leave such rows out")
    return label, {}


SEPARATORS = ("|", ";", ",")


class LabelList(list[object]):
    """A record's list of labels that knows what its data set says of it: ``hot`` lists are 0 and 1 for each label."""

    def __init__(self, items: Iterable[object], hot: bool) -> None:
        super().__init__(items)
        self.hot = hot


def with_label_lists(records: Iterable[tuple[Fields, str]]) -> list[tuple[Fields, str]]:
    """A whole data set's records, whose lists of labels know what they are; see ``unnamed_labels``.

    ``[0, 1]`` is the second of two labels in a data set of such lists, and both in one of class indices. No part of
    the data set can tell them apart later.
    """
    rows = list(records)
    labels = [_labels_field(*row) if {"label", "labels"} & row[0].keys() else ("", None) for row in rows]
    if not any(isinstance(value, list) for _, value in labels):
        return rows
    hot = unnamed_labels(row for row, (name, _) in zip(rows, labels, strict=True) if name) > 0
    return [
        ({**fields, name: LabelList(value, hot)}, where) if isinstance(value, list) else (fields, where)
        for (fields, where), (name, value) in zip(rows, labels, strict=True)
    ]


def unnamed_labels(records: Records) -> int:
    """How many labels records have that are lists of 0 and 1, one for each label; 0 where they are not.

    A record that says nothing of its labels (null, -100) is none of those that decide.
    """
    size = 0
    for record, where in records:
        value = _labels_field(record, where)[1]
        if value is None or (not isinstance(value, list) and number_of(value) == IGNORED):
            continue
        if not isinstance(value, list) or size not in (0, len(value)) or not _is_hot(value):
            return 0
        if isinstance(value, LabelList) and not value.hot:
            return 0
        size = len(value)
    return size


def label_names(records: Records) -> set[str]:
    """The labels of records that may have several each; digits from 0 where they are lists of 0 and 1."""
    records = list(records)
    rows = [(_labels_field(record, where)[1], where) for record, where in records]
    if count := unnamed_labels(records):
        return set(map(str, range(count)))
    texts = [value for value, _ in rows if isinstance(value, str)]
    separator = next((mark for mark in SEPARATORS if any(mark in text for text in texts)), SEPARATORS[0])
    return {name for value, where in rows for name in _names(value, where, separator)} - {NO_LABEL}


def read_labels(record: Record, where: str, known: Mapping[str, int]) -> dict[str, float]:
    """What a record says of its labels: 1 for those it has, -100 where it is not known; all others it has not.

    Under ``label`` or ``labels``: a list of names, or of 0 and 1 for each known label (where it could be both, names
    unless ``with_label_lists`` knows better); names in one text, parted by ``|``, ``;`` or a comma; or 0 and 1 (or a
    share between) by name. Empty: none of the labels.
    """
    name, value = _labels_field(record, where)
    if isinstance(value, list) and _says_of_each(value, known):
        found = dict(zip(known, (IGNORED if item is None else float(item) for item in value), strict=True))
    elif isinstance(value, Mapping):
        found = {read_label(key, where, name): IGNORED if item is None else _share(item) for key, item in value.items()}
    elif not isinstance(value, list) and number_of(value) == IGNORED:
        return dict.fromkeys(known, float(IGNORED))
    else:
        ways = (_names(value, where, mark) for mark in SEPARATORS)
        found = dict.fromkeys(
            next((way for way in ways if _all_known(way, known)), _names(value, where, _mark(value))), 1.0
        )
        found.pop(NO_LABEL, None)
    for label, share in found.items():
        if not 0 <= share <= 1 and share != IGNORED:
            own = value.get(label, share) if isinstance(value, Mapping) else share
            raise DataError(f"{where}: field {name!r} has {own!r} for {label!r}; expected 0, 1, or a share between")
    return {known_label(label, known, where, name): share for label, share in found.items()}


def holds_several(records: Records) -> bool:
    """Whether labels are lists: records that may have several."""
    return any(isinstance(_opened(record.get("label")), list) for record, _ in records)


def _labels_field(record: Record, where: str) -> tuple[str, object]:
    """The name and value of the field with a record's labels; None where it is empty."""
    name = "labels" if "label" not in record and "labels" in record else "label"
    value = record.get(name)
    return name, _opened(required(record, where, name, "a list of labels") if name not in record else value)


def _opened(value: object) -> object:
    """A value; where a cell holds a list or an object as JSON, that. What is a sequence is a list."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    value = _plain(value)
    items = None if isinstance(value, list) else _items(value)
    return value if items is None else items


def _is_hot(values: Sequence[object]) -> bool:
    """Whether a list says of each label whether it applies (or how much), rather than naming those that do."""
    numbers = (math.nan if isinstance(item, str) else IGNORED if item is None else number_of(item) for item in values)
    return len(values) > 1 and all(0 <= number <= 1 or number == IGNORED for number in numbers)


def _says_of_each(values: Sequence[object], known: Mapping[str, int]) -> bool:
    """Whether a list has 0 and 1 for each known label; a bare list that could be names too is names."""
    if len(values) != len(known) or not _is_hot(values):
        return False
    if isinstance(values, LabelList) and values.hot:
        return True
    names = {f"{number_of(item):g}" for item in values if item is not None and not isinstance(item, bool)}
    return len(names) < len(values) or not names <= known.keys()


def _all_known(labels: Sequence[str], known: Mapping[str, int]) -> bool:
    return known.keys() >= {*labels} or {*map(spelled, known)} >= {*map(spelled, labels)}


def _mark(value: object) -> str:
    return next((mark for mark in SEPARATORS if isinstance(value, str) and mark in value), SEPARATORS[0])


def _names(value: object, where: str, separator: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, Mapping | list):
        found = [read_label(item, where, f"label[{index}]") for index, item in enumerate(value)]
        twice = next((name for name in found if found.count(name) > 1), None)
        if twice is not None:
            raise DataError(
                f"{where}: field 'label' has {twice!r} twice; expected names, each once, or 0 and 1 for every label: "
                "lists of the same length in all records"
            )
        return found
    parts = value.split(separator) if isinstance(value, str) else [value]
    return [read_label(part, where, "label") for part in parts if not isinstance(part, str) or part.strip()]


_INTEGRAL = re.compile(r"^(-?[0-9]+)\.0+$")


def _share(value: object) -> float:
    """How much a label applies, also where a cell says ``True`` or ``False``."""
    text = spelled(value) if isinstance(value, str) else ""
    return float(text == "true") if text in ("true", "false") else number_of(value)


_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def number_of(value: object) -> float:
    """A number, also where a text is one as a table writes it (``-1.5``, ``2e-3``), NaN where it is none: ``1_5``."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def read_tags(record: Record, where: str, known: Mapping[str, int] | None = None) -> list[str | None]:
    """The class of each word under ``tags``, as the ``known`` ones are called where there are some; None for words that
    have none (-100, as torch and HuggingFace write)."""
    tags = [read_label(tag, where, f"tags[{index}]") for index, tag in enumerate(read_list(record, where, "tags"))]
    return [
        None if tag == NO_LABEL else tag if known is None else known_label(tag, known, where, f"tags[{index}]")
        for index, tag in enumerate(tags)
    ]


def read_score(record: Record, where: str) -> float:
    """A finite number under ``score``, or under ``label`` when there is no score; digits in a text count."""
    name = "label" if record.get("score") is None and record.get("label") is not None else "score"
    value = required(record, where, name, "a number")
    number = math.nan if isinstance(_plain(value), bool) else number_of(value)
    if not math.isfinite(number):
        raise DataError(f"{where}: field {name!r} is {kind_of(value)}; expected a finite number")
    return number


def read_integer(record: Record, where: str, name: str, least: int, most: int) -> int:
    """An integer from ``least`` to ``most``; integral floats count, and a text of either."""
    value = required(record, where, name, f"an integer from {least} to {most}")
    value = _plain(value)
    plain = isinstance(value, int | float | str) and not isinstance(value, bool)
    number = number_of(value) if plain else math.nan
    if not number.is_integer() or not least <= number <= most:
        raise DataError(f"{where}: field {name!r} is {kind_of(value)}; expected an integer from {least} to {most}")
    return int(number)


def sorted_labels(labels: set[str]) -> tuple[str, ...]:
    """Labels in an order that depends on nothing else: by value, then name, when all are integers, else by name."""
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def kind_of(value: object) -> str:
    """A value for an error message: what it is and, cut short, what it says."""
    if value is None:
        return "null"
    shown = repr(value)
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    return f"{shown} ({type(value).__name__})"


BY_KIND: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("redact", "patterns"), (TOKEN_CLASSIFICATION,)),
    "offsets": (TOKEN_CLASSIFICATION, QUESTION_ANSWERING),
    **dict.fromkeys(
        ("dimensions", "encoding_format", "embedding_types", "pooling", "chunks", "chunk_tokens"), (EMBEDDING,)
    ),
    **dict.fromkeys(("input_type", "prompt_name"), VECTOR_KINDS),
}
"""Options that tasks of some kinds take, and the others refuse."""


def divided(record: Record, where: str, kinds: Mapping[str, str]) -> dict[str, Record]:
    """One record for several deltas, given the kinds of their tasks: for each of them, by name, what of it is its own.

    An option of some kinds alone is for the deltas of those; Unsupported where none of them is.
    """
    options = [name for name in BY_KIND if record.get(name) is not None]
    for name in options:
        if not any(kind in BY_KIND[name] for kind in kinds.values()):
            raise Unsupported(
                f"{where}: field {name!r} is for {' and '.join(BY_KIND[name])}, which none of the deltas does; "
                "leave it out"
            )
    return {
        delta: {name: value for name, value in record.items() if name not in options or kind in BY_KIND[name]}
        for delta, kind in kinds.items()
    }
