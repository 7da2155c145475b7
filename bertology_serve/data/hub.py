"""Data sets of the HuggingFace hub, through ``datasets`` where it is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bertology_serve.errors import DataError, Unsupported, one_line
from bertology_serve.tasks.spec import IGNORED

PREFIX = "hub:"
SPLITS = ("train", "validation", "dev", "test")


def read(name: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(fields, where) of each row of ``hub:NAME[@REVISION][:CONFIG][:SPLIT]``; ``train`` unless a split is named.

    A single part after the name is the split when it is called train, validation, dev or test. Class indices become
    the names that the data set gives them, and -1 (a hidden label) becomes None; -100 (no label) stays.

    Raises DataError for a data set or a row that cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise Unsupported(
            f"{name}: hub data sets need the package datasets; pip install bertology-serve[data]"
        ) from None
    repository, config, split = parse_name(name)
    repository, _, revision = repository.partition("@")
    at = {"revision": revision} if revision else {}
    try:
        rows = datasets.load_dataset(repository, config, split=split, **at)
    except Exception as error:  # its own, the hub's, the network's, pyarrow's
        raise DataError(f"{name}: the data set cannot be loaded ({one_line(error)})") from None
    yield from rows_of(rows, name)


def rows_of(rows: Any, name: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(fields, where) of each row of a ``datasets.Dataset``, class indices as names; see ``read``."""
    row = 0
    try:
        classes = {column: found for column, feature in (rows.features or {}).items() if (found := _classes(feature))}
        for row, fields in enumerate(rows, 1):
            named = {column: _named(fields[column], known) for column, known in classes.items()}
            yield {**fields, **named}, f"{name}:{row}"
    except Exception as error:  # a row is decoded as it is read
        raise DataError(f"{name}:{row + 1}: the row cannot be read ({one_line(error)})") from None


def parse_name(name: str) -> tuple[str, str | None, str]:
    """(repository, config or None, split) of ``hub:NAME[:CONFIG][:SPLIT]``."""
    parts = name.removeprefix(PREFIX).split(":")
    if not parts[0] or len(parts) > 3:
        raise DataError(f"{name!r} is no hub data set; expected hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT")
    if len(parts) == 2 and parts[1] in SPLITS:
        parts.insert(1, "")
    config, split = [*parts[1:], "", ""][:2]
    return parts[0], config or None, split or "train"


def _classes(feature: Any) -> list[str] | None:
    """The class names of a column, or of the items of a column of lists."""
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    return list(names) if names else None


def _named(value: Any, known: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, known) for item in value]
    if not isinstance(value, int) or isinstance(value, bool) or value == IGNORED:
        return value
    return known[value] if 0 <= value < len(known) else None
