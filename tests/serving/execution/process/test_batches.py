from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bertology_serve.deltas.delta import BaseRef, Delta
from bertology_serve.serving.execution.channel import (
    PAGE,
    Lost,
    SharedMemory,
    put_batch,
    put_outputs,
    take_batch,
    take_outputs,
)
from bertology_serve.tasks.spec import Encoding, TaskSpec

NUMBERS = st.integers(0, 2**31 - 1)
BASE = BaseRef("b", "0" * 64, "bert")
TASKS = {
    "class": TaskSpec("classification", ("a", "b", "c")),
    "grade": TaskSpec("regression"),
    "tags": TaskSpec("token-classification", ("O", "B-X")),
    "sense": TaskSpec("embedding", head="none"),
}


@st.composite
def sequences(draw: st.DrawFn) -> tuple[int, Encoding]:
    length = draw(st.integers(0, 20))
    column = st.lists(NUMBERS, min_size=length, max_size=length)
    return draw(st.integers(0, 300)), Encoding(tuple(draw(column)), tuple(draw(column)))


def both() -> tuple[SharedMemory, SharedMemory]:
    """One memory, as two processes have it."""
    one = SharedMemory()
    return one, SharedMemory(os.dup(one.fd))


@given(st.lists(sequences(), max_size=12))
def test_a_batch_arrives_as_it_was(owned):
    ours, theirs = both()
    assert take_batch(theirs, *put_batch(ours, owned)) == owned


def test_memory_grows_on_both_sides():
    ours, theirs = both()
    for count in (3, PAGE, 5, 3 * PAGE):
        ours.write([np.arange(count, dtype=np.int32)])
        assert theirs.read(count, np.int32)[-1] == count - 1


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_whatever_sizes_are_said_there_are_so_many_or_they_are_lost(sequences, tokens):
    ours, theirs = both()
    put_batch(ours, [(0, Encoding((7, 8, 9), (0, 0, 0)))])
    try:
        found = take_batch(theirs, sequences, tokens)
    except Lost:
        return
    assert len(found) == sequences
    assert sum(len(encoding) for _, encoding in found) == tokens


def test_outputs_arrive_bit_for_bit():
    ours, theirs = both()
    tokens = Encoding((1, 2, 3, 4), (0, 0, 0, 0))
    owned = [(Delta(name, BASE, task), tokens) for name, task in TASKS.items()]
    outputs = [torch.randn(3), torch.tensor([float("nan")]), torch.randn(4, 2), torch.randn(8)]
    count = put_outputs(ours, outputs)
    found = take_outputs(theirs, count, owned, 8)
    for one, other in zip(found, outputs, strict=True):
        assert one.shape == other.shape
        assert one.numpy().tobytes() == other.numpy().tobytes()
    with pytest.raises(Lost, match="20 numbers came back; expected 16"):
        take_outputs(theirs, count, owned, 4)
