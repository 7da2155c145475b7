from __future__ import annotations

from bertology_serve.training.sampler import Sampler


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
