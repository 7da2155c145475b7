"""The splits of well-known data sets, from a folder where it has them, else from the HuggingFace hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from bertology_serve.data.formats import HUB_PREFIX, SET_PREFIX, Dataset, Fields, Row
from bertology_serve.data.sets import SETS, DataSet, set_named
from bertology_serve.errors import DataError, NotFound, Unsupported, nearest, one_line
from bertology_serve.tasks.spec import IGNORED

FOLDER = "BERTOLOGY_DATA"
ENDS = (".jsonl", ".jsonl.gz", ".parquet", ".tsv", ".tsv.gz", ".csv", ".csv.gz", ".json", ".conll")
ALSO: Mapping[str, tuple[str, ...]] = {
    "dev": ("validation", "val", "valid", "validation_matched", "dev_matched"),
    "mismatched": ("validation_mismatched", "dev_mismatched"),
}


def find_set(name: str) -> DataSet:
    """The set of ``NAME``, ``NAME@FOLDER`` or a folder that is called as its set. Raises NotFound."""
    return _split_name(name)[0]


def read_split(text: str, read_file: Callable[[Path], Iterable[Row]]) -> Iterator[Row]:
    """(record, where) of each row of ``set:NAME:SPLIT``; NAME may be the folder that holds the set, or NAME@FOLDER.

    Without a folder, files are looked for below the one that ``BERTOLOGY_DATA`` names, as ``NAME/SPLIT.jsonl`` and the
    like, and then the hub is asked. ``read_file`` reads one file. Raises NotFound, DataError.
    """
    name, split = parse(text)
    found, folder = _split_name(name)
    file = locate(found, split, folder)
    for row, where in read_file(file) if file else _hub_rows(found, split, text):
        if found.subset and row.get("subset", found.subset) != found.subset:
            continue
        for record in _records(found, row, where):
            yield record, where


def has_split(name: str, split: str) -> bool:
    """Whether a split is there to be read: as a file, or, where no folder was named, on the hub."""
    found, folder = _split_name(name)
    try:
        file = locate(found, split, folder)
    except NotFound:
        return False
    return file is not None or (bool(found.hub) and split in found.splits)


def parse(text: str) -> tuple[str, str]:
    """Name and split of ``set:NAME[:SPLIT]``; the split is ``train`` unless it is named."""
    name, _, split = text.removeprefix(SET_PREFIX).rpartition(":")
    return (name, split) if name else (split, "train")


def locate(found: DataSet, split: str, folder: Path | None = None) -> Path | None:
    """The file of a split: in the folder, which must hold it, else below that of ``BERTOLOGY_DATA``, if it is there."""
    home = os.environ.get(FOLDER)
    below = [Path(home, *found.name.split("/")), Path(home, found.name.rpartition("/")[2])] if home else []
    names = (split, *ALSO.get(split, ()))
    paths = (place / f"{name}{end}" for place in ([folder] if folder else below) for name in names for end in ENDS)
    there = next((path for path in paths if path.is_file()), None)
    if there is None and folder:
        ends = ", ".join(ENDS)
        raise NotFound(f"{folder} holds no file of the split {split!r}; expected {split}.jsonl or another of {ends}")
    return there


def _split_name(name: str) -> tuple[DataSet, Path | None]:
    """The set, and the folder that was named with it."""
    known, at, folder = name.partition("@")
    if at:
        return set_named(known), Path(folder)
    if name in SETS or not Path(name).is_dir():
        return set_named(name), None
    parts = Path(os.path.abspath(name)).parts
    whole = "/".join(parts[-2:])
    return set_named(whole if whole in SETS else parts[-1]), Path(name)


def _hub_rows(found: DataSet, split: str, text: str) -> Iterable[Row]:
    if split not in found.splits:
        raise NotFound(f"{found.name} has no split {split!r}; {nearest(split, found.splits)}")
    if not found.hub:
        raise NotFound(f"{text}: {found.name} is read from files; put them below the folder that {FOLDER} names")
    place, _, config = found.hub.partition(":")
    return read(f"{HUB_PREFIX}{place}:{config}:{found.splits[split]}")


def _records(found: DataSet, row: Fields, where: str) -> Iterator[Fields]:
    """A row's records; rows that are in our shape already stay as they are."""
    if _is_ours(row):
        yield row
        return
    for field, column in found.columns.items():
        if column not in row and field not in row:
            raise DataError(f"{where}: no column {column!r} for {field!r}; {nearest(column, map(str, row))}")
    taken = {field: row[column] for field, column in found.columns.items() if column in row}
    kept = {name: value for name, value in row.items() if name not in (*taken, *found.columns.values())}
    yield from found.shape({**kept, **taken}, where)


def _is_ours(row: Fields) -> bool:
    """Whether a row has our names where the sets have others."""
    return not {"text_a", "text_pair", "choices"}.isdisjoint(row)


SPLITS = ("train", "validation", "dev", "test")


def read(name: str) -> Iterator[Row]:
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


def rows_of(rows: Dataset, name: str) -> Iterator[Row]:
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
    parts = name.removeprefix(HUB_PREFIX).split(":")
    if not parts[0] or len(parts) > 3:
        raise DataError(f"{name!r} is no hub data set; expected hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT")
    if len(parts) == 2 and parts[1] in SPLITS:
        parts.insert(1, "")
    config, split = [*parts[1:], "", ""][:2]
    return parts[0], config or None, split or "train"


def _classes(feature: object) -> list[str] | None:
    """The class names of a column, or of the items of a column of lists."""
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    return list(names) if names else None


def _named(value: object, known: list[str]) -> object:
    if isinstance(value, list):
        return [_named(item, known) for item in value]
    if not isinstance(value, int) or isinstance(value, bool) or value == IGNORED:
        return value
    return known[value] if 0 <= value < len(known) else None
