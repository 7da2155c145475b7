"""Parquet files, through pyarrow where it is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bertology_serve.errors import DataError, Unsupported, one_line


def read(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(values by column, where) of each row; where names the row, from 1.

    Raises DataError for a broken file, for two columns of one name, and for a value that Python cannot hold (a text
    that is not UTF-8, a time in odd nanoseconds), naming its column.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise Unsupported(
            f"{path}: Parquet needs pyarrow; pip install bertology-serve[data], or save the file as JSONL"
        ) from None
    row = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{path}: two columns are called {twice!r}; name every column once")
            for batch in file.iter_batches():
                columns = [_values(path, row + 1, *column) for column in zip(names, batch.columns, strict=True)]
                for values in zip(*columns, strict=True):
                    row += 1
                    yield dict(zip(names, values, strict=True)), f"{path}:{row}"
    except DataError:
        raise
    except Exception as error:  # pyarrow raises nearly everything over bytes that are not what they should be
        raise DataError(f"{path}:{row + 1}: broken Parquet file ({one_line(error)}); write it again") from None


def _values(path: Path, row: int, name: str, column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except Exception as error:  # ValueError, OverflowError, pytz's own, ...
        raise DataError(
            f"{path}:{row}: column {name!r} cannot be read from this row on ({one_line(error)}); write it again in "
            "another type, or leave it out"
        ) from None
