from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertology_serve.tasks.token_classification import join_words, split_words


@pytest.mark.parametrize(
    "text",
    [
        "Ada Lovelace met Jean-Luc O'Brien in Paris .",
        "U.S. prices rose 1,000.50 at 10:30 !",
        "see https://x.org/a_b?c=1 ) @user #tag don't e-mail",
        "नमस्ते दुनिया",
        "北 京 ok",
        "a ' b - c",
    ],
)
def test_texts_that_are_spaced_out_stay_as_they_are(text):
    assert [text[start:end] for start, end in split_words(text)] == text.split()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("John's dog, Paris.", ["John", "'s", "dog", ",", "Paris", "."]),
        ("They’ve won (3-1)", ["They", "’ve", "won", "(", "3-1", ")"]),
        ("https://x.org.", ["https://x.org", "."]),
        ("北京go", ["北", "京", "go"]),
        ("Paris,London", ["Paris", ",", "London"]),
        ("me@x.org", ["me", "@", "x", ".", "org"]),
    ],
)
def test_punctuation_and_clitics_are_words_of_their_own(text, words):
    assert [text[start:end] for start, end in split_words(text)] == words


@given(st.text(max_size=40))
def test_words_cover_all_but_white_space_in_order(text):
    spans = split_words(text)
    covered = "".join(text[start:end] for start, end in spans)
    assert covered == "".join(text.split())
    assert all(start < end for start, end in spans)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))


def test_joining_keeps_spans():
    text, spans = join_words(("New", "York", "!"))
    assert text == "New York !"
    assert [text[start:end] for start, end in spans] == ["New", "York", "!"]
