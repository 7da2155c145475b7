"""Texts -> ``Encoding``: one call of the Rust tokenizer a sequence, cut to length here.

Truncation and padding are settings of a Rust tokenizer, shared by everyone who holds it: HuggingFace's call sets them
anew every time, and two threads doing so meet with "Already borrowed". So each tokenizer is cloned once with both
switched off, the clone is never changed afterwards, and sequences are cut in Python: the rows that stay are the same
as with HuggingFace's ``truncation=True``, from the side that the tokenizer's ``truncation_side`` names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from threading import Lock
from typing import TypeVar
from weakref import WeakKeyDictionary

from tokenizers import Encoding as RustEncoding
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from bertology_serve.errors import Unsupported
from bertology_serve.tasks.spec import Encoding, TaskSpec

BRIEF = 4096  # characters, or words
MOST_WINDOWS = 64  # of a text; training holds them all at once
_clones: WeakKeyDictionary[PreTrainedTokenizerBase, _Clone] = WeakKeyDictionary()
_lock = Lock()
P = TypeVar("P")
Span = tuple[int, int]


class _Clone:
    """A tokenizer's Rust part without truncation and padding, for texts and for words, whether it has types, and
    whether texts are cut from their start.
    """

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
        self.left = tokenizer.truncation_side == "left"


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None, max_length: int, offsets: bool = False
) -> Encoding:
    """One text or a pair, special tokens included; the longer of a pair is cut first, at the tokenizer's side.

    Character ``offsets`` and ``parts`` are filled only when asked for: answers at sequence level do not need them, and
    a large training set would hold gigabytes of them.
    """
    clone = _clone_of(tokenizer)
    found = _encoded(clone.texts, text, pair)
    window = _Window()
    if len(found) > max_length:
        parts = _parts(found)
        first, second = parts.count(0), parts.count(1)
        room = max(max_length - (len(parts) - first - second), 0)
        keep = _kept(parts, *_longest_first(first, second, room), clone.left)
        window = _Window(keep, cut=len(parts) - len(keep))
    return _encodings(found, clone.types, [window], *_places(found, offsets))[0]


def encode_words(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], starts: Sequence[int], max_length: int
) -> Encoding:
    """Words that are already apart (HuggingFace's ``is_split_into_words``), cut at the tokenizer's side.

    ``starts`` is the character at which each word starts in the text. Byte-level tokenizers see every word with a
    space before it, as ``add_prefix_space=True`` does.
    """
    return word_windows(tokenizer, words, starts, max_length, 0, 1)[0]


def word_windows(
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[str],
    starts: Sequence[int],
    max_length: int,
    stride: int,
    most: int = MOST_WINDOWS,
) -> list[Encoding]:
    """The same in at most so many windows, as ``encode_windows``: each word is its first token's window's to answer."""
    clone = _clone_of(tokenizer)
    found = _encoded(clone.words, list(words), None)
    owners = [-1 if word is None else word for word in found.word_ids]
    placed = zip(found.offsets, owners, strict=True)
    spans = [(start + starts[word], end + starts[word]) if word >= 0 else (0, 0) for (start, end), word in placed]
    parts = _parts(found)
    windows = _windows(parts, max_length, stride, 0, most, clone.left)
    encodings = _encodings(found, clone.types, windows, spans, parts)
    for number, window in enumerate(windows):
        answered = _pick(owners, window.rows)
        if len(windows) > 1:
            own = {owners[row] for row in window.own if not row or owners[row] != owners[row - 1]}
            answered = tuple(word if word in own else -1 for word in answered)
        encodings[number] = replace(encodings[number], words=answered)
    return encodings


def encode_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    pair: str | None,
    max_length: int,
    stride: int,
    of: int | None = None,
    offsets: bool = False,
    most: int | None = MOST_WINDOWS,
) -> list[Encoding]:
    """A text, or each window of one of two (``of``: 0 or 1; by default the longer) beside the other.

    Windows overlap by ``stride`` tokens, at most half a window, so that their number stays linear in the text. The
    other text may take half of the room and is cut beyond it. What it lacks, and what stands outside ``most`` windows,
    is the first one's ``cut``. A token in two windows belongs to that in which it has more context
    (Devlin et al. 2019 do so for SQuAD): the border is the middle of the overlap. ``max_length`` must leave room for
    two tokens.
    """
    clone = _clone_of(tokenizer)
    found = _encoded(clone.texts, text, pair)
    parts = _parts(found)
    longer = int(parts.count(1) > parts.count(0)) if of is None else of
    windows = _windows(parts, max_length, stride, longer, most, clone.left)
    return _encodings(found, clone.types, windows, *_places(found, offsets))


def encode_long(
    tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None, task: TaskSpec, offsets: bool = False
) -> list[Encoding]:
    """One text or a pair, cut or in windows as the task says."""
    if task.long == "windows":
        return encode_windows(tokenizer, text, pair, task.max_length, task.stride, offsets=offsets)
    return [encode_text(tokenizer, text, pair, task.max_length, offsets)]


def own_rows(encodings: Sequence[Encoding], stride: int) -> list[list[int]]:
    """For each window of one text, encoded with offsets, its rows that belong to it: each token of the text once."""
    texts = [[row for row, part in enumerate(encoding.parts) if part == 0] for encoding in encodings]
    step, found, first = window_step(len(texts[0]), stride), list[list[int]](), 0
    for number, (encoding, rows) in enumerate(zip(encodings, texts, strict=True)):
        count = encoding.own if len(encodings) > 1 else len(rows)
        found.append(rows[first - number * step :][:count])
        first += count
    return found


@dataclass(frozen=True)
class _Window:
    """``rows`` of a sequence (None: all), those of them that belong to it, and see ``Encoding``."""

    rows: list[int] | None = None
    own: range = range(0)
    cut: int = 0
    continues: bool = False


def _windows(
    parts: Sequence[int], max_length: int, stride: int, of: int, most: int | None, left: bool
) -> list[_Window]:  # fmt: skip
    """See ``encode_windows``; ``parts`` say which text each row is of, ``left`` that texts lose their start."""
    count, other = parts.count(of), parts.count(1 - of)
    start = parts.index(of) if count else 0
    if len(parts) <= max_length:
        return [_Window(None, range(start, start + count))]
    room = max(max_length - (len(parts) - count - other), 0)
    kept = min(other, room // 2 if count else room)
    size = room - kept
    step = window_step(size, stride)
    lost = max(count - size - (most - 1) * step, 0) if left and most else 0  # before the first window
    start, count = start + lost, count - lost
    lefts = range(start, start + max(count - size, 0) + step, step)[:most]
    rights = [min(left + size, start + count) for left in lefts]
    borders = [start, *((left + right + 1) // 2 for left, right in zip(lefts[1:], rights, strict=False)), rights[-1]]
    beside = _kept(parts, *((0, kept) if of == 0 else (kept, 0)), left)
    before, after = [row for row in beside if row < start], [row for row in beside if row >= start]
    cut = lost + start + count - rights[-1] + other - kept
    return [
        _Window([*before, *range(left, right), *after], range(*own), 0 if number else cut, number > 0)
        for number, (left, right, own) in enumerate(zip(lefts, rights, pairwise(borders), strict=True))
    ]


def window_step(size: int, stride: int) -> int:
    """How many tokens further each window of ``size`` tokens begins."""
    return max(size - min(stride, size // 2), 1)


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


def _kept(parts: Sequence[int], first: int, second: int, left: bool) -> list[int]:
    """Rows that stay: special tokens, and so many of each text from its start, or where they lose it from its end."""
    room, keep = {0: first, 1: second}, []
    rows = range(len(parts))
    for row in reversed(rows) if left else rows:
        part = parts[row]
        if part < 0:
            keep.append(row)
        elif room[part] > 0:
            room[part] -= 1
            keep.append(row)
    return sorted(keep)


def _encodings(
    found: RustEncoding, types: bool, windows: Sequence[_Window], spans: Sequence[Span], parts: Sequence[int]
) -> list[Encoding]:
    """What each window has of a sequence; spans and parts where there are any."""
    ids = found.ids
    kinds = found.type_ids if types else (0,) * len(ids)
    return [
        Encoding(
            ids=_pick(ids, window.rows),
            types=_pick(kinds, window.rows),
            offsets=_pick(spans, window.rows) if spans else (),
            parts=_pick(parts, window.rows) if parts else (),
            cut=window.cut,
            continues=window.continues,
            own=len(window.own),
        )
        for window in windows
    ]


def _places(found: RustEncoding, offsets: bool) -> tuple[Sequence[Span], Sequence[int]]:
    """The character span and the part of each row, where they are asked for."""
    return (found.offsets, _parts(found)) if offsets else ((), ())


def _pick(values: Sequence[P], keep: list[int] | None) -> tuple[P, ...]:
    return tuple(values) if keep is None else tuple(values[row] for row in keep)
