"""CSV and TSV files with a header line."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from bertology_serve.data.jsonl import parse
from bertology_serve.data.lines import MOST_BYTES, read_lines
from bertology_serve.errors import DataError

LISTS = ("tokens", "tags", "choices", "answers")

Row = tuple[Mapping[str, Any], str]


def read_csv(path: Path) -> Iterator[Row]:
    """(cells by column, where) of each row of a file with commas; cells may be quoted and hold line breaks."""
    return _read(path, ",", csv.QUOTE_MINIMAL)


def read_tsv(path: Path) -> Iterator[Row]:
    """The same for tabs. Quotes are letters like any other, as in GLUE's files."""
    return _read(path, "\t", csv.QUOTE_NONE)


def decode_lists(fields: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Fields that are lists, decoded where a cell holds them as JSON."""
    cells = {name: fields[name] for name in LISTS if isinstance(fields.get(name), str)}
    decoded = {
        name: parse(cell, f"{where}: column {name!r}", "a list as JSON, or a text that does not begin like one")
        for name, cell in cells.items()
        if cell.lstrip()[:1] in ("[", "{")
    }
    return {**fields, **decoded} if decoded else fields


def _read(path: Path, delimiter: str, quoting: Literal[0, 3]) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), MOST_BYTES))  # of the whole process; Python's own is 128 KiB
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, quoting=quoting, strict=True)
    rows = _rows(reader, path)
    header = _header(next(rows, None), path)
    for where, cells in rows:
        if len(cells) != len(header):
            raise DataError(
                f"{where}: {len(cells)} cells; the header names {len(header)} columns ({', '.join(header)})"
            )
        yield {name: cell or None for name, cell in zip(header, cells, strict=True) if name}, where


def _rows(reader: Any, path: Path) -> Iterator[tuple[str, list[str]]]:
    """(where, cells) of each row that is not blank; where names the line on which the row starts."""
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{where}: malformed row ({error}); check its quotes and line ends") from None
        if cells is None:
            return
        if cells:
            yield where, cells


def _header(found: tuple[str, list[str]] | None, path: Path) -> list[str]:
    """The columns' names without blanks at their ends; a column without a name (pandas' index) is passed over."""
    if found is None:
        raise DataError(f"{path}: empty file; expected a header line and rows")
    where, header = found[0], [name.strip() for name in found[1]]
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None or not any(header):
        problem = "names no column" if twice is None else f"names {twice!r} twice"
        raise DataError(f"{where}: the header {problem}; name every column once")
    return header
