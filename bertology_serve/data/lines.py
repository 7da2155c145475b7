"""Lines of a UTF-8 text file, gzipped or not, each with its number."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import IO

from bertology_serve.errors import DataError

BOM = b"\xef\xbb\xbf"
MOST_BYTES = 64 * 2**20
"""The longest line that is read: a record is one example, and a small .gz may hold a line without an end."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of each line; a byte order mark is dropped.

    Raises DataError, naming file and line, for bytes that are not UTF-8, NUL bytes, lines of more than ``MOST_BYTES``
    (once decompressed), and broken gzip files.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in bounded_lines(file, str(path)):
                yield number, _decode(line.removeprefix(BOM) if number == 1 else line, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: broken gzip file ({error}); fetch or compress it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def bounded_lines(file: BufferedIOBase | IO[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end) of each line of a binary file; DataError for one of more than MOST_BYTES."""
    number = 1
    while line := file.readline(MOST_BYTES + 1):
        if len(line) > MOST_BYTES:
            raise DataError(f"{name}:{number}: a line of more than {MOST_BYTES >> 20} MiB; expected one record a line")
        yield number, line
        number += 1


def _decode(line: bytes, where: str) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise DataError(f"{where}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        raise DataError(f"{where}: a NUL byte; expected text in UTF-8 (is the file binary, or UTF-16?)")
    return text
