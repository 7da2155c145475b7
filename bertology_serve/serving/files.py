"""Reading and writing lines: ``-`` is standard input or output; a file appears whole or not at all."""

from __future__ import annotations

import gzip
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from bertology_serve.errors import DataError, NotFound
from bertology_serve.files import replacing

STANDARD = "-"


@contextmanager
def reading(name: str) -> Iterator[IO[bytes]]:
    """The bytes of a file (.gz too) or of standard input; NotFound, DataError where they cannot be read."""
    if name == STANDARD:
        yield sys.stdin.buffer
        return
    try:
        opened = cast(IO[bytes], gzip.open(name, "rb")) if name.endswith(".gz") else open(name, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise NotFound(f"no file {name}; expected JSON lines, or - for standard input") from None
    except OSError as problem:
        raise DataError(f"cannot read {name}: {problem.strerror}; expected a file of JSON lines") from None
    with opened:
        try:
            yield opened
        except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
            raise DataError(f"{name}: broken gzip file ({problem}); fetch or compress it again") from None


@contextmanager
def writing(name: str) -> Iterator[IO[bytes]]:
    """A file that takes its name only when everything was written; devices and standard output are written as they are.

    DataError where there is no such directory or it cannot be written to.
    """
    path = Path(name)
    if name == STANDARD:
        try:
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        except BrokenPipeError:  # the reader has seen enough; what is left goes nowhere, at exit too
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if path.exists() and not path.is_file():
        if path.is_dir():
            raise DataError(f"{name} is a directory; expected the name of a file to write")
        with path.open("wb") as device:
            yield device
        return
    with replacing(path.resolve()) as own:  # through links, so that a link stays one
        try:
            file = own.open("xb")
        except OSError as problem:
            raise DataError(f"cannot write {name}: {problem.strerror}; choose another place") from None
        with file:
            yield file
