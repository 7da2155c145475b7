from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertology_serve.errors import DataError, LimitError
from bertology_serve.serving.protocol.tensors import InputTensor, OutputTensor, read_texts, split


def tensor(shape, data=None, datatype="BYTES", size=None):
    return InputTensor("text", shape, datatype, None if size is None else {"binary_data_size": size}, data)


def packed(*texts: str) -> bytes:
    return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)


@pytest.mark.parametrize("data", [["a", "b", "c", ""], [["a", "b"], ["c", ""]]])
def test_flat_and_nested_data_are_the_same(data):
    assert read_texts(tensor([2, 2], data), None, 10) == [["a", "b"], ["c"]]


def test_one_dimension_is_one_text_a_row():
    assert read_texts(tensor([2], ["a", ""]), None, 10) == [["a"], []]
    assert read_texts(tensor([0], []), None, 10) == []
    assert read_texts(tensor([2, 0], []), None, 10) == [[], []]


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1), min_size=1))
def test_binary_data_round_trips(texts):
    output = OutputTensor("x", "BYTES", (len(texts),), texts)
    part, blob = output.as_binary()
    assert part["parameters"] == {"binary_data_size": len(blob)}
    assert blob == packed(*texts)
    assert read_texts(tensor([len(texts)], size=len(blob)), blob, 10_000) == [[text] for text in texts]


def test_numbers_in_binary():
    part, blob = OutputTensor("x", "FP32", (1, 2), [0.5, 2.0]).as_binary()
    assert np.frombuffer(blob, "<f4").tolist() == [0.5, 2.0]
    assert part["shape"] == (1, 2)
    assert OutputTensor("x", "INT64", (1,), [7]).as_binary()[1] == struct.pack("<q", 7)


@pytest.mark.parametrize(
    ("wrong", "blob", "message"),
    [
        (tensor([1], ["a"], "INT64"), None, "datatype is 'INT64'; expected BYTES"),
        (tensor([], ["a"]), None, r"expected \[n\] or \[n, k\]"),
        (tensor([1, 1, 1], ["a"]), None, r"expected \[n\] or \[n, k\]"),
        (tensor([-1], ["a"]), None, r"expected \[n\] or \[n, k\]"),
        (tensor([2], ["a"]), None, "means 2 elements, but the data has 1"),
        (tensor([1], [1]), None, "an element is a number; expected texts"),
        (tensor([1], [[["a"]]]), None, "an element is a list"),
        (tensor([2, 2], [["a"], ["b", "c", "d"]]), None, r"nested otherwise than shape \[2, 2\]; expected rows of 2"),
        (tensor([2, 2], [["a", "b", "c", "d"]]), None, "nested otherwise than shape"),
        (tensor([2], [["a", "b"]]), None, "nested otherwise than shape"),
        (tensor([2], ["a", ["b"]]), None, "nested otherwise than shape"),
        (tensor([1], ["a"]), packed("b"), "data in the JSON and in binary"),
        (tensor([1]), None, "there is no data"),
        (tensor([1]), b"\x01\x00", "ends inside an element's length"),
        (tensor([1]), struct.pack("<I", 9) + b"abc", "an element of 9 bytes does not fit"),
        (tensor([1]), struct.pack("<I", 1) + b"\xff", "not UTF-8"),
    ],
)
def test_malformed_tensors(wrong, blob, message):
    with pytest.raises(DataError, match=message):
        read_texts(wrong, blob, 10)


def test_a_huge_shape_is_refused_before_anything_is_made_of_it():
    with pytest.raises(LimitError, match="at most 10 rows and 10 columns"):
        read_texts(tensor([10**18], ["a"]), None, 10)


def test_binary_parts_follow_each_other():
    inputs = [tensor([1], size=2), tensor([1], ["a"]), tensor([1], size=3)]
    assert split(inputs, b"xxyyy") == [b"xx", None, b"yyy"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [([9], "binary_data_size is 9, but 5 binary bytes are left"), ([-1], "is -1"), (["5"], "is 5"), ([True], "is True"),
     ([2], "3 binary bytes belong to no input")],
)  # fmt: skip
def test_binary_sizes_must_fit(sizes, message):
    with pytest.raises(DataError, match=message):
        split([tensor([1], size=size) for size in sizes], b"xxyyy")
