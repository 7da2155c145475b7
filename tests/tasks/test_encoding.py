from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from bertology_serve.errors import Unsupported
from bertology_serve.tasks import encoding
from bertology_serve.tasks.encoding import encode_text, encode_windows, encode_words

FIRST = "The quick brown fox jumped unbelievably over thirteen lazy dogs"
SECOND = "A wonderfully short sentence"
WORDS = ["Ada", "Lovelace's", "unbelievable", "!", "Zürich", "x" * 30]


@pytest.mark.parametrize("length", range(3, 30))
@pytest.mark.parametrize("pair", [None, SECOND, FIRST, FIRST + " " + FIRST])
def test_texts_are_cut_as_huggingface_cuts_them(minilm, length, pair):
    if pair is not None and length < 5:
        return
    theirs = minilm(FIRST, pair, truncation=True, max_length=length, return_offsets_mapping=True)
    ours = encode_text(minilm, FIRST, pair, length, offsets=True)
    assert list(ours.ids) == theirs["input_ids"]
    assert list(ours.types) == theirs["token_type_ids"]
    assert list(ours.offsets) == theirs["offset_mapping"]
    assert [None if part < 0 else part for part in ours.parts] == theirs.sequence_ids()


@pytest.mark.parametrize("length", [3, 4, 7, 12, 40])
def test_words_are_aligned_as_huggingface_aligns_them(minilm, length):
    theirs = minilm(WORDS, is_split_into_words=True, truncation=True, max_length=length)
    starts = [sum(len(word) + 1 for word in WORDS[:i]) for i in range(len(WORDS))]
    ours = encode_words(minilm, WORDS, starts, length)
    assert list(ours.ids) == theirs["input_ids"]
    assert [None if word < 0 else word for word in ours.words] == theirs.word_ids()
    text = " ".join(WORDS)
    for word, (start, end) in zip(ours.words, ours.offsets, strict=True):
        assert word < 0 or text[start:end] in WORDS[word]


@pytest.mark.parametrize("pair", [None, SECOND * 300])
def test_long_texts_are_encoded_as_short_ones_are(minilm, pair, monkeypatch):
    """They are encoded as batches of one."""
    text, words = FIRST * 300, WORDS * 2000
    long = encode_text(minilm, text, pair, 10**6, offsets=True), encode_words(minilm, words, [0] * len(words), 10**6)
    monkeypatch.setattr(encoding, "BRIEF", 10**9)
    assert long[0] == encode_text(minilm, text, pair, 10**6, offsets=True)
    assert long[1] == encode_words(minilm, words, [0] * len(words), 10**6)


def test_byte_level_words_have_a_space_before_them(byte_level):
    ours = encode_words(byte_level, WORDS, [0] * len(WORDS), 200)
    spaced = byte_level(" " + " ".join(WORDS))["input_ids"]
    assert list(ours.ids) == spaced
    assert set(ours.words) == {-1, *range(len(WORDS))}
    glued = byte_level("".join(WORDS))["input_ids"]
    assert list(ours.ids) != glued


def test_families_without_token_types_get_zeros(byte_level):
    encoding = encode_text(byte_level, FIRST, SECOND, 200)
    assert set(encoding.types) == {0}
    assert len(encoding.types) == len(encoding.ids)
    assert byte_level(FIRST, SECOND)["input_ids"] == list(encoding.ids)


def test_windows_cover_the_context_with_overlap(minilm):
    context = " ".join(f"word{i}" for i in range(80))
    whole = encode_windows(minilm, "which word ?", context, 512, 8)
    assert len(whole) == 1
    windows = encode_windows(minilm, "which word ?", context, 40, 8)
    theirs = minilm(
        "which word ?", context, truncation="only_second", max_length=40, stride=8, return_overflowing_tokens=True
    )
    assert [list(window.ids) for window in windows] == theirs["input_ids"]
    assert [list(window.types) for window in windows] == theirs["token_type_ids"]
    seen = {span for window in windows for span, part in zip(window.offsets, window.parts, strict=True) if part == 1}
    assert seen == {span for span, part in zip(whole[0].offsets, whole[0].parts, strict=True) if part == 1}


def test_a_long_question_leaves_half_of_the_room_and_windows_stay_few(minilm):
    context = " ".join(["fox"] * 200)
    windows = encode_windows(minilm, " ".join(["why"] * 50), context, 33, 64)
    assert {len(window) for window in windows} <= set(range(18, 34))
    assert all(window.parts.count(0) == 15 for window in windows)
    assert len(windows) == 25  # 15 context tokens a window, 7 of overlap: (200 - 7) / 8


@pytest.mark.parametrize("length", [8, 9])
def test_the_smallest_lengths_still_move_on(minilm, length):
    windows = encode_windows(minilm, "why not now", "a b c d e f g h", length, 64)
    assert all(len(window) <= length for window in windows)
    seen = [span for window in windows for span, part in zip(window.offsets, window.parts, strict=True) if part == 1]
    assert sorted(set(seen)) == [(2 * i, 2 * i + 1) for i in range(8)]


def test_threads_with_other_lengths_do_not_disturb_each_other(minilm):
    def work(length):
        return [len(encode_text(minilm, FIRST, None, length)) for _ in range(200)]

    def theirs(length):
        return [len(minilm(FIRST, truncation=True, max_length=length)["input_ids"]) for _ in range(50)]

    with ThreadPoolExecutor(5) as pool:
        disturbing = pool.submit(theirs, 4)
        results = list(pool.map(work, [5, 6, 7, 8]))
        disturbing.result()
    assert results == [[length] * 200 for length in (5, 6, 7, 8)]


def test_the_tokenizer_itself_is_left_alone(minilm):
    before = minilm.backend_tokenizer.to_str()
    encode_text(minilm, FIRST, None, 5)
    encode_words(minilm, WORDS, [0] * len(WORDS), 5)
    assert minilm.backend_tokenizer.to_str() == before


def test_a_tokenizer_without_rust_part_is_refused():
    class Slow(SimpleNamespace):
        __hash__ = object.__hash__

    with pytest.raises(Unsupported, match=r"Slow has no Rust tokenizer; put a tokenizer\.json"):
        encode_text(Slow(model_input_names=[]), "text", None, 8)
