"""A retrieval set as BEIR lays it out: a folder of ``corpus.jsonl``, ``queries.jsonl`` and who is relevant to what.

Its documents become records ``{"id", "text"}``, title first, its queries ``{"id", "text", "relevant": {document:
grade}}``; queries without a judgement are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bertology_serve.data.formats import Row, read_jsonl, read_tsv
from bertology_serve.errors import DataError, NotFound

CORPUS, QUERIES = "corpus.jsonl", "queries.jsonl"


def find_set(path: str) -> tuple[Path, str] | None:
    """The folder of a retrieval set, ``DIR`` or ``DIR:SPLIT``, and the split; None where there is none."""
    folder, _, split = path.rpartition(":")
    for place, part in ((path, ""), (folder, split)):
        if place and (Path(place) / CORPUS).is_file():
            return Path(place), part
    return None


def read_set(folder: Path, split: str = "") -> Iterator[Row]:
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
    """The file of judgements."""
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
