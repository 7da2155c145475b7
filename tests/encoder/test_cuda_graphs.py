"""What is remembered of shapes; that replays are right is for ``test_kernels``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bertology_serve.encoder import cuda_graphs
from bertology_serve.encoder.cuda_graphs import Graphs
from bertology_serve.kernels.dispatch import HostPath


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
