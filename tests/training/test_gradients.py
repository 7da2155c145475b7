from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import layer_norms
from bertology_serve.tasks.contrastive import LOSSES, Cosines, Target
from bertology_serve.training.trainer import add_gradient
from tests.training.live import trainer


def test_norms_by_layer_add_up_to_the_whole_gradient(bert: Encoder):
    made = trainer(bert, method="full")
    made.gradient(made.items)
    norms = layer_norms(made.parameters, bert.anatomy)
    assert set(norms) == {"embeddings", "0", "1", "2", "head"}
    whole = math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in made.parameters.values() if p.grad is not None)
    )
    assert math.isclose(math.hypot(*norms.values()), whole, rel_tol=1e-6)
    own = [p for name, p in made.parameters.items() if ".layer.1." in name]
    assert math.isclose(norms["1"], math.hypot(*(float(p.grad.double().norm()) for p in own)), rel_tol=1e-6)


def test_a_delta_s_tensors_are_of_no_layer(bert: Encoder):
    made = trainer(bert, method="lora")
    made.gradient(made.items)
    assert set(layer_norms(made.parameters, bert.anatomy)) == {"delta", "head"}


def test_the_first_steps_are_logged_and_nothing_else_changes(bert: Encoder, monkeypatch):
    lines: list[dict] = []
    made = trainer(bert, method="lora", epochs=2, gradient_steps=2)
    monkeypatch.setattr(made, "_log", lines.append)
    made.run()
    assert ["layer_norms" in line for line in lines] == [True, True, *[False] * (len(lines) - 2)]
    assert len(lines) > 3
    plain = trainer(bert, method="lora", epochs=2)
    plain.run()
    values = zip(made.parameters.values(), plain.parameters.values(), strict=True)
    assert all(a.equal(b) for a, b in values)


@pytest.mark.parametrize("loss", ["mnrl", "mnrl-symmetric", "cosent", "margin-mse", "distill"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(loss: str):
    """In float64; dropout falls on the same numbers in both runs of a part."""
    torch.manual_seed(0)
    inputs = torch.randn(8, 3, 5, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    values = {"score": None, "scores": (2.0, -1.0)} if loss in ("margin-mse", "distill") else {"score": None}
    targets = [Target((3 * i, 3 * i + 1, 3 * i + 2), **values) for i in range(8)]
    targets = [one._replace(score=float(i)) for i, one in enumerate(targets)] if loss == "cosent" else targets

    def run(part):
        return net(torch.cat([inputs[i] for i in part]))

    def value(out, part):
        return LOSSES[loss](Cosines(out), [targets[i] for i in part])

    found = []
    for parts in ([[*range(8)]], [[0, 1, 2], [3], [4, 5, 6, 7]]):
        net.zero_grad()
        whole = add_gradient(parts, run, value, torch.device("cpu"))
        found.append((whole, [p.grad.clone() for p in net.parameters()]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-12)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_parts_draw_the_same_dropout_again():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3, bias=False)).double()
    inputs, drawn = torch.ones(4, 6, dtype=torch.float64), []

    def run(part):
        kept = net[0](inputs[part])
        drawn.append(kept)
        return net[1](kept)

    add_gradient([[0, 1], [2, 3]], run, lambda out, part: out.square().sum(), torch.device("cpu"))
    assert drawn[0].equal(drawn[2])
    assert drawn[1].equal(drawn[3])
    assert not drawn[0].equal(drawn[1])


def test_memory_is_bound_by_the_part(bert: Encoder):
    """No graph is kept of more than ``max_tokens`` rows, whatever the batch."""
    made = trainer(bert, "embedding", method="lora", batch_size=16, max_tokens=20)
    rows: list[int] = []
    run = made.live.forward
    made.live.forward = lambda encodings: (  # type: ignore[method-assign]
        rows.append(sum(map(len, encodings)) * torch.is_grad_enabled()), run(encodings))[1]  # fmt: skip
    made.gradient(made.items)
    assert sum(rows) == sum(item.tokens for item in made.items)
    assert 0 < max(rows) <= 20
