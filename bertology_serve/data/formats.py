"""Files of records, read row by row: JSON lines, CSV and TSV, CoNLL, CoNLL-U, Parquet, BEIR's retrieval sets."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from io import BufferedIOBase
from itertools import chain, groupby
from pathlib import Path
from typing import IO, Any, Literal, Protocol, runtime_checkable

from bertology_serve.errors import DataError, NotFound, Unsupported, one_line

Fields = Mapping[str, Any]
"""The fields of one record, as they were read."""
Row = tuple[Fields, str]
"""A record's fields, and where it stands."""
HUB_PREFIX, SET_PREFIX = "hub:", "set:"
"""What names of data sets begin with: of the hub's, and of well-known ones."""
BOM = b"\xef\xbb\xbf"
MOST_BYTES = 64 * 2**20
"""The longest line that is read: a record is one example, and a small .gz may hold a line without an end."""


@runtime_checkable
class Dataset(Protocol):
    """A ``datasets.Dataset``, as far as it is read."""

    features: Mapping[str, object] | None
    column_names: object

    def __iter__(self) -> Iterator[Fields]: ...


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


def read_jsonl(path: Path) -> Iterator[Row]:
    """(object, where) of each line that is not blank; of each item when the file starts with ``[``."""
    lines = ((number, line) for number, line in read_lines(path) if not line.isspace())
    first = next(lines, None)
    if first is not None and first[1].lstrip().startswith("["):
        items = parse("".join(line for _, line in chain([first], lines)), str(path))
        for row, item in enumerate(items, 1):
            yield _object(item, f"{path}:{row}"), f"{path}:{row}"
        return
    for number, line in chain([first] if first else [], lines):
        yield _object(parse(line, f"{path}:{number}"), f"{path}:{number}"), f"{path}:{number}"


def parse(text: str, where: str, expected: str = "one JSON object a line") -> Any:
    """The JSON value of a text; DataError when it is malformed or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply; expected {expected}") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); expected {expected}") from None


def _object(value: object, where: str) -> Fields:
    if not isinstance(value, dict):
        raise DataError(f'{where}: a JSON {type(value).__name__}; expected an object such as {{"text": ...}}')
    return value


LISTS = ("tokens", "tags", "choices", "answers", "negatives", "scores")


DELIMITERS = ",;\t"
_QUOTED = re.compile('"[^"]*"?')
_CELL = re.compile('[^"]*|"(?:[^"]|"")*"')
"""A cell of a file whose writer quotes: none of its quotes is bare."""


def read_csv(path: Path) -> Iterator[Row]:
    """(cells by column, where) of each row; cells may be quoted and hold line breaks.

    Commas part cells; where the header line has none, its semicolons do, else its tabs.
    """
    lines, head = (line for _, line in read_lines(path)), list[str]()
    for line in lines:
        head.append(line)
        if not line.isspace():
            break
    names = _QUOTED.sub("", head[-1]) if head else ""
    delimiter = next((mark for mark in DELIMITERS if mark in names), DELIMITERS[0])
    yield from _records(_rows(chain(head, lines), path, delimiter, csv.QUOTE_MINIMAL), path)


def read_tsv(path: Path) -> Iterator[Row]:
    """The same for tabs, a line a row.

    Quotes are letters like any other, as in GLUE's files, unless each cell that has some is quoted as a whole, its own
    doubled: so pandas and Excel write.
    """
    rows = list(_rows((line for _, line in read_lines(path)), path, "\t", csv.QUOTE_NONE))
    if all(_CELL.fullmatch(cell) for _, cells in rows for cell in cells):
        rows = [(where, [_unquoted(cell) for cell in cells]) for where, cells in rows]
    yield from _records(iter(rows), path)


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if cell.startswith('"') else cell


def decode_lists(fields: Fields, where: str) -> Fields:
    """Fields that are lists, decoded where a cell holds them as JSON."""
    cells = {name: fields[name] for name in LISTS if isinstance(fields.get(name), str)}
    decoded = {
        name: parse(cell, f"{where}: column {name!r}", "a list as JSON, or a text that does not begin like one")
        for name, cell in cells.items()
        if cell.lstrip()[:1] in ("[", "{")
    }
    return {**fields, **decoded} if decoded else fields


def _records(rows: Iterator[tuple[str, list[str]]], path: Path) -> Iterator[Row]:
    header = _header(next(rows, None), path)
    for where, cells in rows:
        if len(cells) != len(header):
            raise DataError(
                f"{where}: {len(cells)} cells; the header names {len(header)} columns ({', '.join(header)})"
            )
        yield {name: cell or None for name, cell in zip(header, cells, strict=True) if name}, where


def _rows(lines: Iterable[str], path: Path, delimiter: str, quoting: Literal[0, 3]) -> Iterator[tuple[str, list[str]]]:
    """(where, cells) of each row that is not blank; where names the line on which the row starts."""
    csv.field_size_limit(max(csv.field_size_limit(), MOST_BYTES))  # of the whole process; Python's own is 128 KiB
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
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


START, HASH = "-DOCSTART-", "#"
BLANKS = " \t\r\n"
"""What parts columns and lines. Other white space (no-break, thin) is part of a word."""
_BIO = re.compile("O|[BIESMLU]-.+")


def read_conll(path: Path) -> Iterator[Row]:
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
            raise DataError(f"{path}:{number}: the word {cells[0]!r} has no tag; expected word and tag in columns")
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


COLUMNS = 10


def read_conllu(path: Path) -> Iterator[Row]:
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


def _sentence(words: list[tuple[str, list[str]]]) -> Row:
    heads = []
    for number, (where, columns) in enumerate(words, 1):
        digits = columns[6].isascii() and columns[6].isdecimal()
        if columns[0] != str(number) or not digits or int(columns[6]) > len(words):
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


def read_parquet(path: Path) -> Iterator[Row]:
    """(values by column, where) of each row; where names the row, from 1.

    Raises DataError for a broken file, for two columns of one name, and for a value that Python cannot hold (a text
    that is not UTF-8, a time in odd nanoseconds), naming its column.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise Unsupported(f"{path}: Parquet needs pyarrow; pip install bertology-serve[data], or save JSONL") from None
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


CORPUS, QUERIES = "corpus.jsonl", "queries.jsonl"


def find_retrieval_set(path: str) -> tuple[Path, str] | None:
    """The folder of a retrieval set, ``DIR`` or ``DIR:SPLIT``, and the split; None where there is none."""
    folder, _, split = path.rpartition(":")
    for place, part in ((path, ""), (folder, split)):
        if place and (Path(place) / CORPUS).is_file():
            return Path(place), part
    return None


def read_retrieval_set(folder: Path, split: str = "") -> Iterator[Row]:
    """The records of a folder; the judgements are ``qrels.tsv``, or ``qrels/SPLIT.tsv`` (by default the one there is,
    or ``test``). Raises DataError naming file and line, NotFound where a file is missing.
    """
    judged = _judged(folder, split)
    documents = set()
    for fields, where in read_jsonl(folder / CORPUS):
        own = _id(fields.get("_id", fields.get("id")), where)
        documents.add(own)
        text = " ".join(str(fields[name]).strip() for name in ("title", "text") if fields.get(name))
        yield {"id": own, "text": text}, where
    grades: dict[str, dict[str, str]] = {}
    for fields, where in read_tsv(judged):
        lost = next((name for name in ("query-id", "corpus-id", "score") if fields.get(name) is None), None)
        if lost is not None:
            raise DataError(f"{where}: column {lost!r} is missing; expected query-id, corpus-id and score")
        if fields["corpus-id"] not in documents:
            raise DataError(f"{where}: document {str(fields['corpus-id'])!r} is not in {folder / CORPUS}")
        grades.setdefault(str(fields["query-id"]), {})[str(fields["corpus-id"])] = str(fields["score"])
    for fields, where in read_jsonl(folder / QUERIES):
        own = _id(fields.get("_id", fields.get("id")), where)
        if own in grades:
            yield {"id": own, "text": fields.get("text"), "relevant": grades.pop(own)}, where
    if grades:
        raise DataError(f"{judged}: query {next(iter(grades))!r} is not in {folder / QUERIES}")


def _id(value: object, where: str) -> str:
    if value is None:
        raise DataError(f"{where}: field '_id' is missing; expected the id of a document or query")
    return str(value)


def _judged(folder: Path, split: str) -> Path:
    parts = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
    alone = folder / "qrels.tsv"
    if not split and alone.is_file():
        return alone
    wanted = split or (parts[0] if len(parts) == 1 else "test")
    if wanted not in parts:
        raise NotFound(
            f"{folder} has no judgements {wanted!r}; expected qrels.tsv, or qrels/SPLIT.tsv and {folder}:SPLIT "
            f"({', '.join(parts) or 'no split'} there)"
        )
    return folder / "qrels" / f"{wanted}.tsv"
