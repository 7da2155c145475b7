from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bertology_serve.deltas import store
from bertology_serve.deltas.delta import Delta
from bertology_serve.errors import FormatError, SpecError
from bertology_serve.kinds import kinds, sparse
from bertology_serve.kinds.effects import LowRank
from bertology_serve.kinds.slots import Slot
from bertology_serve.kinds.sparse import Sparse
from tests.deltas import samples


def changes(layers: int = 3, outputs: int = 7, inputs: int = 11, share: float = 0.1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(layers, outputs, inputs, generator=generator)
    return drawn * (torch.rand(drawn.shape, generator=generator) < share)


def product(update: LowRank) -> torch.Tensor:
    return update.b.transpose(1, 2) @ update.a


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_entries_give_the_matrices_back(share: float):
    drawn = changes(share=share)
    own = sparse.entries(drawn)
    assert own["counts"].shape == (3, 7)
    assert len(own["values"]) == len(own["columns"]) == int((drawn != 0).sum())
    assert torch.equal(sparse.matrices(own, 11), drawn)


def test_the_low_rank_is_exact_and_picks_the_fewer():
    rows, columns = changes(share=1.0), changes(share=1.0)
    rows[:, [0, 2, 3, 5, 6]] = 0.0
    columns[:, :, 3:] = 0.0
    for drawn, rank in ((rows, 2), (columns, 3), (changes(share=0.9), 7), (changes(inputs=4, share=0.9), 4)):
        update = sparse.low_rank(drawn)
        assert torch.equal(product(update), drawn)
        assert update.a.shape[1] == update.b.shape[1] == rank


def test_layers_that_stayed_are_left_out():
    drawn = changes(share=0.5)
    drawn[1] = 0.0
    assert sparse.low_rank(drawn).layers == (0, 2)
    assert sparse.low_rank(changes(share=0.5)).layers is None


def test_gradients_reach_the_values():
    own = sparse.entries(changes())
    own["values"].requires_grad_()
    product(sparse.low_rank(sparse.matrices(own, 11))).sum().backward()
    assert torch.equal(own["values"].grad, torch.ones_like(own["values"]))


def sample(family: str) -> Delta:
    """A sparse delta of query and down, each layer with entries of its own."""
    anatomy = samples.anatomy(family)

    def drawn(slot: Slot) -> dict[str, torch.Tensor]:
        return sparse.entries(changes(slot.depth, slot.outputs, slot.inputs, 0.05))

    own = {name: drawn(anatomy.slot(name)) for name in ("query", "down")}
    spec = Sparse(tuple(own), tuple(len(tensors["values"]) for tensors in own.values()))
    tensors = {f"sparse.{name}.{part}": tensor for name, parts in own.items() for part, tensor in parts.items()}
    return replace(samples.delta(family, ()), specs=(spec,), tensors=tensors)


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v3"])
def test_it_comes_back_from_disk_bit_for_bit(tmp_path: Path, family: str):
    delta, anatomy = sample(family), samples.anatomy(family)
    store.save(delta, tmp_path / "d", anatomy, samples.options(family))
    again = store.load(tmp_path / "d", anatomy)
    assert samples.same(replace(again, version=""), delta)
    slot = anatomy.slot("query")
    update = again.effects(anatomy).low_rank["query"]
    assert torch.equal(product(update), changes(slot.depth, slot.outputs, slot.inputs, 0.05))
    assert "peft computes no sparse" in (tmp_path / "d" / "README.md").read_text()


@pytest.mark.parametrize(
    ("part", "value"), [("counts", -1.0), ("counts", 0.5), ("counts", 33.0), ("columns", -1.0), ("columns", 32.0)]
)
def test_places_that_cannot_be_are_refused(part: str, value: float):
    delta = sample("bert")
    delta.tensors[f"sparse.query.{part}"].flatten()[0] = value
    with pytest.raises(FormatError, match="a sparse update's counts and columns do not place its"):
        delta.effects(samples.anatomy("bert"))


def test_it_is_not_trained():
    with pytest.raises(SpecError, match="cut out of a fully tuned model"):
        kinds.init([Sparse(("query",), (3,))], samples.anatomy("bert"), torch.Generator())


@pytest.mark.parametrize("values", [{"kept": (1, 2)}, {"kept": (0,)}])
def test_specs_that_make_no_sense(values):
    with pytest.raises(SpecError, match=r"1 targets and 2|query is 0"):
        Sparse(("query",), **values)


def test_what_a_batch_reads_is_counted():
    delta, anatomy = sample("bert"), samples.anatomy("bert")
    updates = delta.effects(anatomy).low_rank.values()
    read = sum(side.nbytes for update in updates for side in (update.a, update.b))
    assert delta.resident_bytes(anatomy) == delta.bytes + read
    other = replace(delta, specs=(), tensors={})
    assert other.resident_bytes(anatomy) == other.bytes
