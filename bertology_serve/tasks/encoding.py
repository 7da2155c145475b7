"""Texts -> ``Encoding``: one call of the Rust tokenizer a sequence, cut to length here.

Truncation and padding are settings of a Rust tokenizer, shared by everyone who holds it: HuggingFace's call sets them
anew every time, and two threads doing so meet with "Already borrowed". So each tokenizer is cloned once with both
switched off, the clone is never changed afterwards, and sequences are cut in Python: the rows that stay are the same
as with HuggingFace's ``truncation=True``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from threading import Lock
from typing import TypeVar
from weakref import WeakKeyDictionary

from tokenizers import Encoding as RustEncoding
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from bertology_serve.errors import Unsupported
from bertology_serve.tasks.spec import Encoding

BRIEF = 4096  # characters, or words
_clones: WeakKeyDictionary[PreTrainedTokenizerBase, _Clone] = WeakKeyDictionary()
_lock = Lock()
P = TypeVar("P")


class _Clone:
    """A tokenizer's Rust part without truncation and padding, for texts and for words, and whether it has types."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            kind = type(tokenizer).__name__
            raise Unsupported(f"{kind} has no Rust tokenizer; put a tokenizer.json beside the model")
        source = backend.to_str()
        self.texts = _clone(source, backend)
        settings = json.loads(source)
        prefixed = _prefixed(settings)
        self.words = self.texts if prefixed == settings else _clone(json.dumps(prefixed), backend)
        self.types = "token_type_ids" in tokenizer.model_input_names


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None, max_length: int, offsets: bool = False
) -> Encoding:
    """One text or a pair, special tokens included; the longer of a pair is cut first, from its end.

    Character ``offsets`` and ``parts`` are filled only when asked for: answers at sequence level do not need them, and
    a large training set would hold gigabytes of them.
    """
    clone = _clone_of(tokenizer)
    found = _encoded(clone.texts, text, pair)
    keep = None
    if len(found) > max_length:
        parts = _parts(found)
        first, second = parts.count(0), parts.count(1)
        room = max(max_length - (len(parts) - first - second), 0)
        keep = _kept(parts, *_longest_first(first, second, room))
    return _encoding(found, clone.types, keep, offsets, 0 if keep is None else len(found) - len(keep))


def encode_words(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], starts: Sequence[int], max_length: int
) -> Encoding:
    """Words that are already apart (HuggingFace's ``is_split_into_words``), cut from the end.

    ``starts`` is the character at which each word starts in the text. Byte-level tokenizers see every word with a
    space before it, as ``add_prefix_space=True`` does.
    """
    clone = _clone_of(tokenizer)
    found = _encoded(clone.words, list(words), None)
    parts = _parts(found)
    count = parts.count(0)
    keep = None
    if len(parts) > max_length:
        keep = _kept(parts, max(max_length - (len(parts) - count), 0), 0)
    rows = range(len(parts)) if keep is None else keep
    owners = [-1 if word is None else word for word in found.word_ids]
    spans = found.offsets
    return Encoding(
        ids=_pick(found.ids, keep),
        types=_pick(found.type_ids, keep) if clone.types else (0,) * len(rows),
        offsets=tuple(_shifted(spans[row], starts[owners[row]]) if owners[row] >= 0 else (0, 0) for row in rows),
        parts=_pick(parts, keep),
        words=_pick(owners, keep),
        cut=len(parts) - len(rows),
    )


def encode_windows(
    tokenizer: PreTrainedTokenizerBase, question: str, context: str, max_length: int, stride: int
) -> list[Encoding]:
    """A question with each window of a context, as pairs; only the context is cut, with ``stride`` tokens of overlap.

    A question may take half of the room and is cut beyond it; an overlap of more than half of a window is lowered to
    half, so that the number of windows stays linear in the context. ``max_length`` must leave room for two tokens.
    What the question lacks is the first window's ``cut``.
    """
    clone = _clone_of(tokenizer)
    found = _encoded(clone.texts, question, context)
    parts = _parts(found)
    if len(parts) <= max_length or 1 not in parts:
        return [_encoding(found, clone.types, None, True)]
    start, end = parts.index(1), len(parts) - parts[::-1].index(1)
    room = max_length - (len(parts) - parts.count(0) - (end - start))
    asked = min(parts.count(0), room // 2)
    window = room - asked
    before, after = _kept(parts[:start], asked, 0), list(range(end, len(parts)))
    step = window - min(stride, window // 2)
    encodings: list[Encoding] = []
    for left in range(start, end, step):
        right = min(left + window, end)
        cut = 0 if encodings else parts.count(0) - asked
        encodings.append(_encoding(found, clone.types, before + list(range(left, right)) + after, True, cut))
        if right == end:
            break
    return encodings


def _encoded(clone: Tokenizer, text: str | list[str], pair: str | None) -> RustEncoding:
    """One sequence; a long one as a batch of one, since only batches let other threads run meanwhile."""
    words = isinstance(text, list)
    if len(text) + len(pair or "") <= BRIEF:
        return clone.encode(text, pair, is_pretokenized=words)
    return clone.encode_batch([text if pair is None else (text, pair)], is_pretokenized=words)[0]


def _clone_of(tokenizer: PreTrainedTokenizerBase) -> _Clone:
    clone = _clones.get(tokenizer)
    if clone is None:
        with _lock:
            clone = _clones.get(tokenizer) or _Clone(tokenizer)
            _clones[tokenizer] = clone
    return clone


def _clone(source: str, backend: Tokenizer) -> Tokenizer:
    clone = Tokenizer.from_str(source)
    clone.no_truncation()
    clone.no_padding()
    clone.encode_special_tokens = backend.encode_special_tokens
    return clone


def _prefixed(node: object) -> object:
    """A tokenizer.json in which byte-level parts put a space before each word."""
    if isinstance(node, dict):
        node = {key: value if key == "vocab" else _prefixed(value) for key, value in node.items()}
        if node.get("type") in ("ByteLevel", "RobertaProcessing") and "add_prefix_space" in node:
            node["add_prefix_space"] = True
    elif isinstance(node, list) and node and isinstance(node[0], dict):
        node = [_prefixed(item) for item in node]
    return node


def _parts(found: RustEncoding) -> list[int]:
    """Per row: 0 first text, 1 pair, -1 special token."""
    return [-1 if part is None else part for part in found.sequence_ids]


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each text stay, as the Rust ``longest_first`` decides."""
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (short, long) if first <= second else (long, short)


def _kept(parts: Sequence[int], first: int, second: int) -> list[int]:
    """Rows that stay: special tokens, and so many of each text from its start."""
    left = {0: first, 1: second}
    keep = []
    for row, part in enumerate(parts):
        if part < 0:
            keep.append(row)
        elif left[part] > 0:
            left[part] -= 1
            keep.append(row)
    return keep


def _encoding(found: RustEncoding, types: bool, keep: list[int] | None, offsets: bool, cut: int = 0) -> Encoding:
    ids = _pick(found.ids, keep)
    return Encoding(
        ids=ids,
        types=_pick(found.type_ids, keep) if types else (0,) * len(ids),
        offsets=_pick(found.offsets, keep) if offsets else (),
        parts=_pick(_parts(found), keep) if offsets else (),
        cut=cut,
    )


def _pick(values: Sequence[P], keep: list[int] | None) -> tuple[P, ...]:
    return tuple(values) if keep is None else tuple(values[row] for row in keep)


def _shifted(span: tuple[int, int], by: int) -> tuple[int, int]:
    return span[0] + by, span[1] + by
