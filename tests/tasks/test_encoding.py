from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bertology_serve.errors import Unsupported
from bertology_serve.tasks import encoding
from bertology_serve.tasks.encoding import MOST_WINDOWS, encode_text, encode_windows, encode_words, word_windows

FIRST = "The quick brown fox jumped unbelievably over thirteen lazy dogs"
SECOND = "A wonderfully short sentence"
WORDS = ["Ada", "Lovelace's", "unbelievable", "!", "Zürich", "x" * 30]


@pytest.fixture(params=["right", "left"])
def sided(minilm_path, request):
    """The same tokenizer, which cuts texts at one side or the other."""
    return AutoTokenizer.from_pretrained(minilm_path, truncation_side=request.param)


@pytest.mark.parametrize("length", range(3, 30))
@pytest.mark.parametrize("pair", [None, SECOND, FIRST, FIRST + " " + FIRST])
def test_texts_are_cut_as_huggingface_cuts_them(sided, length, pair):
    minilm = sided
    if pair is not None and length < 5:
        return
    theirs = minilm(FIRST, pair, truncation=True, max_length=length, return_offsets_mapping=True)
    ours = encode_text(minilm, FIRST, pair, length, offsets=True)
    assert list(ours.ids) == theirs["input_ids"]
    assert list(ours.types) == theirs["token_type_ids"]
    assert list(ours.offsets) == theirs["offset_mapping"]
    assert [None if part < 0 else part for part in ours.parts] == theirs.sequence_ids()
    assert ours.cut == len(minilm(FIRST, pair)["input_ids"]) - len(ours)


@pytest.mark.parametrize("length", [3, 4, 7, 12, 40])
def test_words_are_aligned_as_huggingface_aligns_them(sided, length):
    minilm = sided
    theirs = minilm(WORDS, is_split_into_words=True, truncation=True, max_length=length)
    starts = [sum(len(word) + 1 for word in WORDS[:i]) for i in range(len(WORDS))]
    ours = encode_words(minilm, WORDS, starts, length)
    assert list(ours.ids) == theirs["input_ids"]
    assert [None if word < 0 else word for word in ours.words] == theirs.word_ids()
    assert ours.cut == len(minilm(WORDS, is_split_into_words=True)["input_ids"]) - len(ours)
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
    whole = encode_windows(minilm, "which word ?", context, 512, 8, of=1, offsets=True)
    assert len(whole) == 1
    windows = encode_windows(minilm, "which word ?", context, 40, 8, of=1, offsets=True)
    theirs = minilm(
        "which word ?", context, truncation="only_second", max_length=40, stride=8, return_overflowing_tokens=True
    )
    assert [list(window.ids) for window in windows] == theirs["input_ids"]
    assert [list(window.types) for window in windows] == theirs["token_type_ids"]
    seen = {span for window in windows for span, part in zip(window.offsets, window.parts, strict=True) if part == 1}
    assert seen == {span for span, part in zip(whole[0].offsets, whole[0].parts, strict=True) if part == 1}


def test_a_long_question_leaves_half_of_the_room_and_windows_stay_few(minilm):
    context = " ".join(["fox"] * 200)
    windows = encode_windows(minilm, " ".join(["why"] * 50), context, 33, 64, of=1, offsets=True)
    assert {len(window) for window in windows} <= set(range(18, 34))
    assert all(window.parts.count(0) == 15 for window in windows)
    assert [window.cut for window in windows] == [35] + [0] * (len(windows) - 1), "of the question; no context is cut"
    assert len(windows) == 25  # 15 context tokens a window, 7 of overlap: (200 - 7) / 8


def owners(extents: list[tuple[int, int]], tokens: int) -> list[int]:
    """For each token the window in which it has the most context, by definition; text's ends cut nothing off."""

    def context(token: int, window: int) -> float:
        left, right = extents[window]
        before = float("inf") if left == 0 else token - left
        after = float("inf") if right == tokens else right - 1 - token
        return min(before, after)

    return [
        max((i for i, (left, right) in enumerate(extents) if left <= t < right), key=lambda i: (context(t, i), -i))
        for t in range(tokens)
    ]


@given(st.integers(0, 120), st.integers(0, 40), st.integers(8, 50), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_windows_lose_no_token_and_count_none_twice(minilm, tokens, other, length, stride):
    text, pair = " ".join(["fox"] * tokens), " ".join(["dog"] * other) if other else None
    windows = encode_windows(minilm, text, pair, length, stride, of=0, offsets=True, most=None)
    specials = 2 if pair is None else 3
    assert all(len(window) <= length for window in windows)
    places = [[at // 4 for (at, _), part in zip(one.offsets, one.parts, strict=True) if part == 0] for one in windows]
    assert sorted(set(chain(*places))) == list(range(tokens))
    assert all(own == list(range(own[0], own[-1] + 1)) for own in places if own)
    room = length - specials
    size = room - min(other, room // 2) if len(windows) > 1 else tokens
    for before, after in pairwise(places):
        assert len(before) == size
        assert len(set(before) & set(after)) == min(stride, size // 2)
    extents = [(own[0], own[-1] + 1) if own else (0, 0) for own in places]
    found = owners(extents, tokens)
    assert [window.own for window in windows] == [found.count(i) for i in range(len(windows))]
    assert [window.continues for window in windows] == [i > 0 for i in range(len(windows))]
    kept = {window.parts.count(1) for window in windows}
    assert len(kept) == 1
    assert sum(window.cut for window in windows) == other - kept.pop()


@given(st.lists(st.sampled_from(["fox", "unbelievable", "xqzw" * 3]), min_size=1, max_size=60), st.integers(8, 30),
       st.integers(0, 30))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_each_word_is_answered_for_once_from_its_first_token(minilm, words, length, stride):
    starts = [sum(len(word) + 1 for word in words[:i]) for i in range(len(words))]
    whole = encode_words(minilm, words, starts, 10**6)
    windows = word_windows(minilm, words, starts, length, stride)
    assert all(len(window) <= length for window in windows)
    text, found = " ".join(words), []
    for window in windows:
        mine = [word for word in dict.fromkeys(window.words) if word >= 0]
        found += mine
        firsts = [window.words.index(word) for word in mine]
        assert [window.offsets[row][0] for row in firsts] == [starts[word] for word in mine]
        assert all(text[slice(*window.offsets[row])].strip() for row in firsts)
    assert found == list(range(len(words)))
    assert sum(window.own for window in windows) == len(whole) - 2


def test_words_within_the_length_are_encoded_as_ever(minilm):
    for length in (8, 14, 200):
        cut = encode_words(minilm, WORDS, [0] * len(WORDS), length)
        (first, *others) = word_windows(minilm, WORDS, [0] * len(WORDS), length, 3)
        assert first.ids == cut.ids
        assert (first == cut) == (not others) == (cut.cut == 0)


@pytest.mark.parametrize("pair", [None, "a short one"])
def test_windows_of_a_text_are_huggingface_s(minilm, pair):
    text = " ".join(f"word{i}" for i in range(80))
    side = {} if pair is None else {"truncation": "only_first"}
    theirs = minilm(
        text, pair, **({"truncation": True} | side), max_length=30, stride=7, return_overflowing_tokens=True
    )
    ours = encode_windows(minilm, text, pair, 30, 7)
    assert [list(window.ids) for window in ours] == theirs["input_ids"]
    assert [list(window.types) for window in ours] == theirs["token_type_ids"]


def test_more_windows_than_are_read_are_cut_and_said(minilm):
    text = " ".join(["fox"] * 100)
    windows = encode_windows(minilm, text, None, 12, 2, most=3)
    assert len(windows) == 3
    assert [window.cut for window in windows] == [100 - (8 + 8 + 10), 0, 0]
    assert sum(window.own for window in windows) == 26
    assert len(encode_windows(minilm, "fox " * 5000, None, 12, 2)) == MOST_WINDOWS
    assert encode_windows(minilm, "why " * 50, "\u200b", 20, 2, of=1)[0].cut == 50 - (20 - 3), "of no context at all"


def test_windows_where_texts_lose_their_start(minilm, minilm_path):
    """All windows are the same; of more than are read the last stay."""
    left = AutoTokenizer.from_pretrained(minilm_path, truncation_side="left")
    text = " ".join(f"word{i}" for i in range(40))
    for pair, of in ((None, 0), ("which ?", 0), ("which ?", 1)):
        texts = (text, pair) if of == 0 else (pair, text)
        assert encode_windows(left, *texts, 30, 7, of) == encode_windows(minilm, *texts, 30, 7, of)
    whole = left("fox dog " * 50)["input_ids"]
    windows = encode_windows(left, "fox dog " * 50, None, 12, 2, offsets=True, most=3)
    assert [list(window.ids[1:-1]) for window in windows] == [whole[75:85], whole[83:93], whole[91:101]]
    assert [window.cut for window in windows] == [100 - (8 + 8 + 10), 0, 0]
    assert windows[-1].offsets[-2] == (396, 399)
    assert sum(window.own for window in windows) == 26


@pytest.mark.parametrize("length", [8, 9])
def test_the_smallest_lengths_still_move_on(minilm, length):
    windows = encode_windows(minilm, "why not now", "a b c d e f g h", length, 64, of=1, offsets=True)
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
