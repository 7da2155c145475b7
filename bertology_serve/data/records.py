"""Files, data sets and what is in memory -> records; records -> examples of a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from bertology_serve.data import formats
from bertology_serve.data.formats import HUB_PREFIX, SET_PREFIX, Dataset, Fields, Row
from bertology_serve.errors import DataError, NotFound, SpecError, nearest
from bertology_serve.tasks.base import Example, Task
from bertology_serve.tasks.fields import with_label_lists
from bertology_serve.tasks.registry import task_named
from bertology_serve.tasks.spec import CLASSIFICATION, LABEL_KINDS

FIELDS = (
    "text",
    "text_pair",
    "label",
    "score",
    "tokens",
    "tags",
    "question",
    "context",
    "answers",
    "premise",
    "choices",
    "negative",
    "negatives",
    "scores",
)
ALIASES = {"text": ("text_a", "anchor"), "text_pair": ("text_b", "positive")}
READERS = {
    ".jsonl": formats.read_jsonl,
    ".ndjson": formats.read_jsonl,
    ".json": formats.read_jsonl,
    ".csv": formats.read_csv,
    ".tsv": formats.read_tsv,
    ".conllu": formats.read_conllu,
    ".parquet": formats.read_parquet,
    ".conll": formats.read_conll,
}


DataLike = str | Path | Iterable[Any]
"""Files, names of data sets, and what is in memory: mappings, a pandas DataFrame, a ``datasets.Dataset``."""


class Record(NamedTuple):
    """The fields of one record, and where it stands: ``train.csv:17`` is a line, or a row where there are no lines."""

    fields: Fields
    where: str


def read_records(
    data: DataLike, columns: Mapping[str, str] | None = None, remembered: Mapping[str, str] | None = None
) -> list[Record]:
    """All records of a file (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.conllu``, also ``.gz``; ``.parquet``), of a
    hub data set, or of what is in memory: an iterable of mappings, a pandas DataFrame, a ``datasets.Dataset``.

    A hub data set is written ``hub:NAME[:CONFIG][:SPLIT]``, a well-known one ``set:NAME:SPLIT`` (see ``set_files``);
    ``.conll`` files hold a word and its tag a line; a folder with ``corpus.jsonl`` is a retrieval set (see
    ``formats``). ``columns`` maps a field to the column that holds it:
    ``{"text": "sentence"}``, or to several with ``|`` between: ``{"label": "toxic|insult"}``. Where none are given
    those ``remembered`` by a delta count, each in records that have it.
    Cells of CSV and TSV are texts, but lists (``tokens``, ``tags``, ``choices``, ``answers``) are written as JSON, and
    an empty cell is no value; ``formats`` says which quotes count.

    Raises DataError naming file, row and column; NotFound when there is no such file; SpecError for a field in
    ``columns`` that no task reads; Unsupported when the package for Parquet or the hub is missing.
    """
    for field in columns or {}:
        if field not in FIELDS:
            raise SpecError(f"no task reads the field {field!r}; {nearest(field, FIELDS)}")
    known = {field: column for field, column in (remembered or {}).items() if field in FIELDS}
    records = [_record(fields, where, columns or known, bool(columns)) for fields, where in _rows(data)]
    if not records:
        where = data if isinstance(data, str | Path) else name_of(data)
        raise DataError(f"{where}: holds no records; expected at least one")
    return [Record(*row) for row in with_label_lists(records)]


def name_of(data: DataLike) -> str:
    """What a source of records is called: a file's name, a data set's, or that of its type."""
    if isinstance(data, str | Path):
        return str(data) if str(data).startswith((HUB_PREFIX, SET_PREFIX)) else Path(data).name
    return type(data).__name__


def _rows(data: DataLike) -> Iterable[Row]:
    if isinstance(data, str | Path):
        return _named_rows(data)
    if isinstance(data, Dataset):
        from bertology_serve.data import set_files

        return set_files.rows_of(data, name_of(data))
    if isinstance(data, Frame):
        return _frame_rows(data)
    return _listed_rows(data)


@runtime_checkable
class Frame(Protocol):
    """A pandas DataFrame, as far as it is read."""

    columns: Iterable[object]

    def to_dict(self, orient: str) -> list[Fields]: ...


def _frame_rows(frame: Frame) -> Iterable[Row]:
    """The rows of a pandas DataFrame; a missing value (None, NaN, ``pandas.NA``, ``NaT``) is none."""
    for row, fields in enumerate(frame.to_dict("records"), 1):
        values = {str(name): value.tolist() if hasattr(value, "tolist") else value for name, value in fields.items()}
        yield {name: None if _is_missing(value) else value for name, value in values.items()}, f"row {row}"


def _is_missing(value: object) -> bool:
    """``pandas.NA`` is equal to nothing and refuses to say so: types are asked, not values."""
    return type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)


def _listed_rows(rows: Iterable[object]) -> Iterable[Row]:
    for row, fields in enumerate(rows, 1):
        if isinstance(fields, Record):
            yield fields
        elif isinstance(fields, Mapping):
            yield fields, f"record {row}"
        else:
            raise DataError(
                f"record {row} is a {type(fields).__name__}; expected a mapping with the fields of the task, such as "
                "{'text': ..., 'label': ...}"
            )


def _named_rows(path: str | Path) -> Iterable[Row]:
    if Path(path).is_file():
        return _read_file(Path(path))
    searched = formats.find_retrieval_set(str(path))
    if searched is not None:
        return formats.read_retrieval_set(*searched)
    if not str(path).startswith((HUB_PREFIX, SET_PREFIX)):
        return _read_file(Path(path))
    from bertology_serve.data import set_files

    return (
        set_files.read(str(path)) if str(path).startswith(HUB_PREFIX) else set_files.read_split(str(path), _read_file)
    )


def _read_file(path: Path) -> Iterable[Row]:
    if not path.exists():
        raise NotFound(f"no file {path}; give a file that exists, or hub:NAME for a hub data set")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if zipped else suffixes)[-1:]
    reader = READERS.get(kind[0]) if kind else None
    if reader is None or (zipped and reader is formats.read_parquet):
        raise DataError(f"{path}: unknown kind of file; expected {', '.join(READERS)}, all but .parquet also with .gz")
    if not path.is_file():
        raise DataError(f"{path}: not a file; give the file inside it")
    return reader(path)


def own_name(column: str) -> str:
    """What a column of a file is called in a record whose field of that name is read from another column."""
    return f"{column} (of the file)"


def field_of(column: str, columns: Mapping[str, str], records: Iterable[Row]) -> str:
    """Under which name records hold a column of their file, with these ``columns`` of fields."""
    field = next((field for field, own in columns.items() if own.strip() == column.strip()), None)
    hidden = own_name(column)
    return field or (hidden if any(hidden in fields for fields, _ in records) else column)


def _record(fields: Fields, where: str, columns: Mapping[str, str], required: bool) -> Record:
    """Renames the mapped columns; a field that is mapped replaces its alias too. What a field takes the name of is
    kept, see ``own_name``."""
    fields = {**fields, **{column: own for column in columns.values() if (own := _together(fields, column))}}
    found = {field: name for field, column in columns.items() if (name := _column(fields, column)) is not None}
    lost = next((field for field in columns if field not in found), None)
    if required and lost is not None:
        column = columns[lost]
        raise DataError(f"{where}: no column {column!r} for {lost!r}; {nearest(column, map(str, fields))}")
    gone = {*found.values(), *(alias for field in found for alias in ALIASES.get(field, ()))}
    kept = {name: value for name, value in fields.items() if name not in gone}
    hidden = {own_name(name): fields[name] for name in fields if name in {*found, *gone} - {*found.values()}}
    named = {**kept, **hidden, **{field: fields[name] for field, name in found.items()}}
    return Record(formats.decode_lists(named, where), where)


def _together(fields: Fields, columns: str) -> dict[str, object]:
    """The values of several columns, ``toxic|insult``, by their names; empty where one of them is none."""
    names = [] if columns in fields else columns.split("|")
    own = {name.strip(): _column(fields, name) for name in names}
    if len(own) < 2 or None in own.values():
        return {}
    return {name: fields[column] for name, column in own.items() if column is not None}


def _column(fields: Fields, column: str) -> str | None:
    """The name that a column has in a record: the same, or the same but for blanks at its ends."""
    return column if column in fields else next((own for own in fields if str(own).strip() == column.strip()), None)


def load_examples(
    path: str | Path,
    task: Task,
    columns: Mapping[str, str] | None = None,
    labelled: bool = True,
    remembered: Mapping[str, str] | None = None,
) -> list[Example]:
    """The checked examples of a file or hub data set; see ``read_records`` for paths and columns.

    Raises DataError for the first record that does not fit the task.
    """
    return [task.example(fields, where, labelled) for fields, where in read_records(path, columns, remembered)]


def infer_labels(kind: str, records: Iterable[Row]) -> tuple[str, ...]:
    """The ``TaskSpec.labels`` for a task of that kind, from training records: stable whatever their order.

    Raises DataError when classification finds fewer than two labels, multi-label none.
    """
    labels = task_named(kind).labels_in(records)
    if kind in LABEL_KINDS and len(labels) < (2 if kind == CLASSIFICATION else 1):
        raise DataError(f"the training data holds only the label {', '.join(labels) or 'none'}; expected at least two")
    return labels
