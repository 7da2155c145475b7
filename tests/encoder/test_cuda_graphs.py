"""What is remembered of shapes; that replays are right is for ``test_kernels``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bertology_serve.encoder import cuda_graphs
from bertology_serve.encoder.bank import DeltaBank, RowPool
from bertology_serve.encoder.cuda_graphs import Graphs
from bertology_serve.kernels.dispatch import HostPath
from tests import tiny


def test_shapes_that_no_graph_can_be_made_for_are_remembered_up_to_the_limit(monkeypatch: pytest.MonkeyPatch):
    tries: list[Any] = []

    def cannot(shape: Any, *_: Any) -> Any:
        tries.append(shape)
        raise HostPath

    monkeypatch.setattr(cuda_graphs, "shape_of", lambda batch, *_: batch.shape)
    monkeypatch.setattr(cuda_graphs, "Recorded", cannot)
    made = Graphs(lambda _: torch.zeros(1), lambda _: (lambda: None, torch.zeros(1)), limit=4)

    def run(shape: int) -> None:
        batch: Any = SimpleNamespace(rows=3, ids=torch.zeros(3), shape=shape)
        plan: Any = None
        assert made.run(batch, plan, plan) is None

    for shape in range(100):
        run(0)
        run(shape)
        assert len(made._unfit) <= 4
    assert tries.count(0) == 1, "what is asked often is not tried again"
    assert tries[1:] == list(range(1, 100))


def test_two_pools_of_other_heights_at_one_address_are_two_shapes(tmp_path: Path):
    """Layers lie a whole height apart: a graph of the one would read other rows of the other, in all but layer 0."""
    anatomy, memory = tiny.encoder("bert", tmp_path).anatomy, torch.zeros(3 * 64 * 8)

    def of_height(rows: int) -> DeltaBank:
        bank = DeltaBank(anatomy, torch.float32, torch.device("cpu"))
        pool = RowPool({"b": (3, 8)}, torch.float32, torch.device("cpu"))
        pool.columns = {"b": memory[: 3 * rows * 8].view(3, rows, 8)}
        bank.pools["query"] = pool
        return bank

    low, high = of_height(32), of_height(64)
    assert low.layer("query", "b", 0).data_ptr() == high.layer("query", "b", 0).data_ptr()
    assert low.layer("query", "b", 1).data_ptr() != high.layer("query", "b", 1).data_ptr()
    assert low.places("query") != high.places("query")
    assert low.places("query") == of_height(32).places("query")
