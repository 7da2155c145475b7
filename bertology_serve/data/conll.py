"""Column files as CoNLL-2003 has them: a word and its tag a line, an empty line between sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bertology_serve.data.lines import read_lines
from bertology_serve.errors import DataError

START = "-DOCSTART-"


def read(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """({"tokens", "tags"}, where) of each sentence; where names its first line.

    The word is the first column, the tag the last; columns stand apart by tabs or spaces. ``-DOCSTART-`` lines and
    lines that begin with ``# `` are no words. Raises DataError for a line of one column.
    """
    tokens: list[str] = []
    tags: list[str] = []
    first = 0
    for number, line in read_lines(path):
        cells = line.split()
        if not cells or cells[0] == START or line.startswith("# "):
            if tokens:
                yield {"tokens": tokens, "tags": tags}, f"{path}:{first}"
            tokens, tags = [], []
            continue
        if len(cells) < 2:
            raise DataError(
                f"{path}:{number}: the word {cells[0]!r} has no tag; expected a word and its tag in columns"
            )
        first = first if tokens else number
        tokens.append(cells[0])
        tags.append(cells[-1])
    if tokens:
        yield {"tokens": tokens, "tags": tags}, f"{path}:{first}"
