from __future__ import annotations

import pytest

from bertology_serve.encoder.pipeline import Request
from bertology_serve.errors import LimitError
from bertology_serve.serving.protocol.json_codec import characters, check_size


@pytest.mark.parametrize(
    ("value", "size"), [("abc", 3), ("", 0), (["ab", "", "c"], 4), ([1, None], 2), (7, 0), (None, 0), ({"a": "b"}, 0)]
)
def test_characters(value, size):
    assert characters(value) == size


def test_a_request_is_the_sum_of_its_fields():
    assert check_size(Request("d", {"text": "abc", "choices": ["d", "ef"], "top_k": 3}), 3) == 6


def test_the_field_over_the_limit_is_named():
    with pytest.raises(LimitError, match=r"item 3: field 'choices' holds 4 characters; at most 3 are taken"):
        check_size(Request("d", {"text": "abc", "choices": ["de", "fg"]}, where="item 3"), 3)
