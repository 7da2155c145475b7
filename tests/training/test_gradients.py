from __future__ import annotations

import math

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.training.layers import layer_norms
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
