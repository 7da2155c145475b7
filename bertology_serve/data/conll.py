"""Column files as CoNLL-2003 has them: a word and its tag a line, an empty line between sentences."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from bertology_serve.data.lines import read_lines
from bertology_serve.errors import DataError

START, HASH = "-DOCSTART-", "#"
BLANKS = " \t\r\n"
"""What parts columns and lines. Other white space (no-break, thin) is part of a word."""
_BIO = re.compile("O|[BIESMLU]-.+")


def read(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """({"tokens", "tags"}, where) of each sentence; where names its first line.

    The word is the first column, the tag the last. Tabs part the columns of a line that has any, else spaces do.
    ``-DOCSTART-`` lines are no words, and neither are comments: lines between sentences that begin with ``# `` and are
    not shaped like the file's words (as many columns, and a tag). Raises DataError for a line of one column, or of
    more or fewer than the sentence's first word.
    """
    rows = [(number, _cells(line, f"{path}:{number}")) for number, line in read_lines(path)]
    plain = [cells for _, cells in rows if cells and cells[0] not in (START, HASH)]
    widths, known = {len(cells) for cells in plain} or {2}, {cells[-1] for cells in plain}
    tokens: list[str] = []
    tags: list[str] = []
    first = width = 0
    for number, cells in rows:
        if not cells or cells[0] == START or (not tokens and _is_comment(cells, widths, known)):
            if tokens:
                yield {"tokens": tokens, "tags": tags}, f"{path}:{first}"
            tokens, tags = [], []
            continue
        if len(cells) < 2:
            raise DataError(
                f"{path}:{number}: the word {cells[0]!r} has no tag; expected a word and its tag in columns"
            )
        first, width = (first, width) if tokens else (number, len(cells))
        if len(cells) != width:
            raise DataError(
                f"{path}:{number}: {len(cells)} columns; line {first}, of the same sentence, has {width} (words with "
                "spaces inside need tabs between columns)"
            )
        tokens.append(cells[0])
        tags.append(cells[-1])
    if tokens:
        yield {"tokens": tokens, "tags": tags}, f"{path}:{first}"


def _cells(line: str, where: str) -> list[str]:
    """The columns of a line; none where it is blank."""
    text = line.strip(BLANKS)
    if "\r" in text:
        raise DataError(f"{where}: a carriage return inside the line; save the file with \\n or \\r\\n as line ends")
    if "\t" in text:
        return [cell.strip(" ") for cell in text.split("\t")]
    return [cell for cell in text.split(" ") if cell]


def _is_comment(cells: list[str], widths: Collection[int], tags: Collection[str]) -> bool:
    """Whether a line between sentences is none of the file's words: ``# sent_id = 2``, but not ``# O``."""
    worded = len(cells) in widths and (cells[-1] in tags or _BIO.fullmatch(cells[-1]))
    return cells[0] == HASH and (not worded or cells[2:3] == ["="])
