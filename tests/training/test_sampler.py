from __future__ import annotations

import pytest

from bertology_serve.training.batches import Buckets, Sampler


def test_every_epoch_holds_each_index_once_in_another_order():
    sampler = Sampler(10, seed=3)
    epochs = [[sampler.take(4) for _ in range(3)] for _ in range(2)]
    assert [list(map(len, epoch)) for epoch in epochs] == [[4, 4, 2]] * 2
    first, second = ([index for batch in epoch for index in batch] for epoch in epochs)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert (sampler.epoch, sampler.offset) == (2, 0)


def test_three_numbers_are_its_whole_state():
    whole = Sampler(10, seed=3)
    taken = [whole.take(3) for _ in range(9)]
    again = Sampler(10, seed=3)
    for _ in range(5):
        again.take(3)
    continued = Sampler(10, seed=3, epoch=again.epoch, offset=again.offset)
    assert [continued.take(3) for _ in range(4)] == taken[5:]


def test_seeds_differ():
    assert Sampler(50, seed=0).take(50) != Sampler(50, seed=1).take(50)


LENGTHS = [7 * i % 101 for i in range(101)]


def batches(window: int, seed: int = 0) -> list[list[int]]:
    """Those of one epoch."""
    sampler = Sampler(101, seed, buckets=Buckets(LENGTHS, 4, window) if window else None)
    return [sampler.take(4) for _ in range(26)]


def spread(found: list[list[int]]) -> float:
    """How much the lengths within a whole batch differ."""
    return sum(max(LENGTHS[i] for i in batch) - min(LENGTHS[i] for i in batch) for batch in found[:-1]) / 25


def test_batches_of_like_length_hold_each_index_once():
    found = batches(window=5)
    assert sorted(index for batch in found for index in batch) == list(range(101))
    assert list(map(len, found)) == [4] * 25 + [1]
    assert spread(batches(window=0)) > 50
    assert spread(batches(window=5)) < 20
    assert 3 <= spread(batches(window=25)) < 4
    means = [sum(LENGTHS[i] for i in batch) for batch in batches(window=25)[:-1]]
    assert means not in (sorted(means), sorted(means, reverse=True)), "the batches themselves are in no order"


def test_batches_of_like_length_differ_by_epoch_and_seed():
    sampler = Sampler(101, 0, buckets=Buckets(LENGTHS, 4, 5))
    epochs = [[sampler.take(4) for _ in range(26)] for _ in range(2)]
    assert epochs[0] == batches(window=5) != epochs[1]
    assert epochs[0] != batches(window=5, seed=1)


@pytest.mark.parametrize("stop", [1, 20, 26, 30])
def test_three_numbers_are_the_state_of_buckets_too(stop: int):
    whole, again = (Sampler(101, 3, buckets=Buckets(LENGTHS, 4, 5)) for _ in range(2))
    taken = [whole.take(4) for _ in range(52)]
    for _ in range(stop):
        again.take(4)
    continued = Sampler(101, 3, again.epoch, again.offset, buckets=Buckets(LENGTHS, 4, 5))
    assert [continued.take(4) for _ in range(52 - stop)] == taken[stop:]
