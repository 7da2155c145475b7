"""CoNLL-U files, as Universal Dependencies has them: a record a sentence.

``tokens`` are the forms, ``tags`` the universal parts of speech, ``heads`` the numbers of the words that they depend
on (from 1; 0 for the root), ``relations`` what joins them, subtypes dropped (``nsubj`` of ``nsubj:pass``). Ranges
(``1-2``) and empty nodes (``1.1``) are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from bertology_serve.data.conll import BLANKS
from bertology_serve.data.lines import read_lines
from bertology_serve.errors import DataError

COLUMNS = 10


def read(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(fields, ``file:line``) of each sentence; raises DataError for lines that are not CoNLL-U."""
    for blank, lines in groupby(read_lines(path), key=lambda numbered: not numbered[1].strip(BLANKS)):
        words = [] if blank else [_word(line, f"{path}:{number}") for number, line in lines if line[0] != "#"]
        kept = [word for word in words if word is not None]
        if kept:
            yield _sentence(kept)


def _word(line: str, where: str) -> tuple[str, list[str]] | None:
    """A line's place and columns; ``None`` for ranges and empty nodes."""
    columns = line.rstrip("\r\n").split("\t")
    if len(columns) != COLUMNS:
        raise DataError(f"{where}: {len(columns)} columns; expected {COLUMNS}, parted by tabs (CoNLL-U)")
    return None if "-" in columns[0] or "." in columns[0] else (where, columns)


def _sentence(words: list[tuple[str, list[str]]]) -> tuple[Mapping[str, Any], str]:
    heads = []
    for number, (where, columns) in enumerate(words, 1):
        if columns[0] != str(number) or not columns[6].isdecimal() or int(columns[6]) > len(words):
            got = f"word {columns[0][:20]!r} with head {columns[6][:20]!r}"
            raise DataError(f"{where}: {got}; expected word {number} with a head of 0 to {len(words)}")
        heads.append(int(columns[6]))
    rows = [columns for _, columns in words]
    fields = {
        "tokens": [row[1] for row in rows],
        "tags": [row[3] for row in rows],
        "heads": heads,
        "relations": [row[7].split(":")[0] for row in rows],
    }
    return fields, words[0][0]
