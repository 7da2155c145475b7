"""Parquet files, through pyarrow where it is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bertology_serve.errors import DataError, Unsupported


def read(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(values by column, where) of each row; where names the row, from 1."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise Unsupported(
            f"{path}: Parquet needs pyarrow; pip install bertology-serve[data], or save the file as JSONL"
        ) from None
    row = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    row += 1
                    yield fields, f"{path}:{row}"
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}:{row + 1}: broken Parquet file ({reason})") from None
