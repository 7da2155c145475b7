"""The bank: extents never overlap, freed rows are used again, rows hold what was put in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertology_serve.encoder.bank import DeltaBank, RowPool
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import Unsupported
from bertology_serve.kinds.effects import Effects, LowRank
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return tiny.encoder("bert", tmp_path_factory.mktemp("bank"))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 10**6)), max_size=40))
def test_extents_hold_their_rows_and_row_zero_stays_zero(steps: list[tuple[bool, int, int]]) -> None:
    pool = RowPool({"a": (2, 3), "b": (2, 5)}, torch.float32, CPU)
    held: dict[int, tuple[int, torch.Tensor]] = {}
    for put, count, seed in steps:
        if put or not held:
            rows = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(seed))
            held[pool.put({"a": rows})] = (count, rows)
        else:
            first = sorted(held)[seed % len(held)]
            pool.drop(first, held.pop(first)[0])
    for first, (count, rows) in held.items():
        assert torch.equal(pool.columns["a"][:, first : first + count], rows)
    taken = sum(count for count, _ in held.values())
    assert torch.equal(pool.columns["a"][:, 0], torch.zeros(2, 3))
    assert sum(hi - lo for lo, hi in pool.free) == pool.capacity - taken - 1
    assert float(pool.columns["a"].abs().sum()) == float(sum(rows.abs().sum() for _, rows in held.values())) or held


def test_loading_and_unloading_a_thousand_times_takes_no_more_memory() -> None:
    pool = RowPool({"a": (2, 3)}, torch.float32, CPU)
    for count in range(1, 1001):
        pool.drop(pool.put({"a": torch.ones(2, count % 7 + 1, 3)}), count % 7 + 1)
    assert pool.capacity == 16
    assert pool.free == [(1, 16)]


def test_a_pool_that_could_not_grow_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out between two columns, and again while rows are copied: no row is lost, and no extent."""
    pool = RowPool({"a": (2, 3), "b": (2, 5)}, torch.float32, CPU)
    kept = torch.ones(2, 3, 3)
    first = pool.put({"a": kept})
    zeros, left = torch.Tensor.new_zeros, iter([True])

    def runs_out(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
        if next(left, None) is None:
            raise RuntimeError("out of memory")
        return zeros(tensor, *shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", runs_out)
        with pytest.raises(RuntimeError, match="out of memory"):
            pool.put({"a": torch.ones(2, 30, 3)})
    with pytest.raises(RuntimeError):
        pool.put({"a": torch.ones(2, 4, 9)})  # wider than the pool: copying fails
    assert pool.free == [(4, 16)]
    assert {column.shape[1] for column in pool.columns.values()} == {pool.capacity} == {16}
    assert torch.equal(pool.columns["a"][:, first : first + 3], kept)
    assert float(pool.columns["a"].sum()) == kept.sum()


def test_a_delta_that_does_not_get_in_leaves_nothing(encoder: Encoder) -> None:
    bank = DeltaBank(encoder.anatomy, torch.float32, CPU)
    width = encoder.anatomy.hidden

    def update(outputs: int) -> LowRank:
        return LowRank(torch.ones(3, 2, width), torch.ones(3, 2, outputs))

    bank.add("first", Effects(low_rank={"query": update(width)}))
    pool, before = bank.pools["query"], list(bank.pools["query"].free)
    narrow = Effects(low_rank={"value": update(width), "query": update(width - 1)})
    with pytest.raises(RuntimeError):
        bank.add("second", narrow)
    assert (bank.pools, pool.free) == ({"query": pool}, before)
    assert bank.entries.keys() == bank._extents.keys() == {"first"}


def test_pools_are_built_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    init = RowPool.__init__
    monkeypatch.setattr(RowPool, "__init__", lambda self, *given: built.append(1) or init(self, *given))
    bank = DeltaBank(encoder.anatomy, torch.float32, CPU)
    for key in "abc":
        bank.add(key, Effects(bias={"query": torch.ones(3, encoder.anatomy.hidden)}))
    assert len(built) == 1


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_values_that_a_type_cannot_hold_are_refused_and_nothing_is_changed(
    first: torch.dtype, encoder: Encoder
) -> None:
    """Rounded up they would be infinite, and so would be what others add to them."""
    bank, shape = DeltaBank(encoder.anatomy, first, CPU), (encoder.depth, 2, encoder.hidden)
    small = Effects(low_rank={"query": LowRank(torch.ones(shape), torch.full(shape, 0.3))})
    large = Effects(low_rank={"query": LowRank(torch.ones(shape), torch.full(shape, torch.finfo(torch.float32).max))})
    bank.add("small", small)
    entries = dict(bank.entries)
    why = r"3.4e\+38 is too large for bfloat16"
    if first == torch.bfloat16:
        with pytest.raises(Unsupported, match=why):
            bank.add("large", large)
    else:
        bank.add("large", large)
        with pytest.raises(Unsupported, match=why):
            bank.cast(torch.bfloat16)
        assert bank.dtype == bank.layer("query", "b", 0).dtype == torch.float32
        bank.remove("large")
        bank.cast(torch.bfloat16)
    assert bank.entries == entries
    held = bank.entries["small"].rows["query"]
    assert bank.layer("query", "b", 0)[held.first : held.last].unique().tolist() == [torch.tensor(0.3).bfloat16()]
