"""Texts to look at the encoder with: plain text, records of any task, or the built-in examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bertology_serve import examples
from bertology_serve.data.formats import read_lines
from bertology_serve.data.records import read_records
from bertology_serve.errors import DataError, NotFound
from bertology_serve.tasks.encoding import encode_text, encode_words
from bertology_serve.tasks.spec import Encoding
from bertology_serve.tasks.token_classification import join_words

Corpus = str | Path | Sequence[str] | None
_PAIRS = (("text", "text_pair"), ("text_a", "text_b"), ("premise", "question"), ("question", "context"))


def corpus_name(corpus: Corpus) -> str:
    """What the report calls it."""
    if corpus is None:
        return "built-in examples"
    return str(corpus) if isinstance(corpus, (str, Path)) else f"{len(corpus)} texts"


def read_corpus(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_length: int, most: int | None = None
) -> list[Encoding]:
    """Tokenised sequences of at most ``max_length`` tokens: a line each of ``.txt``, else a record each.

    ``None`` are the built-in examples, a list holds the texts themselves; ``most`` takes the first so many. Raises
    NotFound, and DataError for records without a text.
    """
    if corpus is None:
        corpus = examples.path("sentiment", "dev")
    if not isinstance(corpus, (str, Path)):
        rows: list[tuple[Mapping[str, Any], str]] = [({"text": text}, f"text {i}") for i, text in enumerate(corpus)]
    elif Path(str(corpus)).suffixes[:1] == [".txt"]:
        rows = _plain(Path(corpus))
    else:
        rows = [(record.fields, record.where) for record in read_records(corpus)]
    if not rows:
        raise DataError(f"{corpus_name(corpus)}: holds no text; expected at least one line")
    return [_encode(fields, where, tokenizer, max_length) for fields, where in rows[:most]]


def _plain(path: Path) -> list[tuple[Mapping[str, Any], str]]:
    if not path.exists():
        raise NotFound(f"no file {path}; give a file that exists, or none for the built-in examples")
    return [({"text": line.strip()}, f"{path}:{number}") for number, line in read_lines(path) if line.strip()]


def _encode(fields: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoding:
    if isinstance(fields.get("tokens"), list):
        words = [str(word) for word in fields["tokens"]]
        _, spans = join_words(tuple(words))
        return encode_words(tokenizer, words, [start for start, _ in spans], max_length)
    for first, second in _PAIRS:
        if isinstance(fields.get(first), str):
            pair = fields.get(second)
            return encode_text(tokenizer, fields[first], pair if isinstance(pair, str) else None, max_length)
    raise DataError(f"{where}: no text; expected a field text, text_a, tokens, question or premise")
