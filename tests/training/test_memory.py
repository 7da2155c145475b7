from __future__ import annotations

import mmap

import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.training import memory
from bertology_serve.training.memory import Peak, estimate, saved_bytes
from tests.training.live import trainer


def test_weights_gradients_and_moments_are_counted(bert: Encoder):
    full = estimate(trainer(bert, method="full"))
    assert full.gradients * 2 == full.optimizer
    assert full.weights == full.gradients, "all is trained"
    assert full.total == full.weights + full.gradients + full.optimizer + full.activations


def test_a_frozen_encoder_keeps_less_and_only_upper_layers_less_still(bert: Encoder, bert_path):
    lora, full = estimate(trainer(bert, method="lora")), estimate(trainer(bert, method="full"))
    assert 0 < lora.activations < full.activations
    assert lora.gradients < lora.weights / 5
    upper = trainer(Encoder.load(str(bert_path)), method="top-k", options={"top-k": {"layers": 1}})
    assert estimate(upper).activations < full.activations / 2


def test_trying_changes_nothing(bert: Encoder):
    made = trainer(bert, method="lora")
    before = torch.get_rng_state(), [p.clone() for p in made.parameters.values()]
    assert saved_bytes(made.live, made.items[:4]) > saved_bytes(made.live, made.items[:2]) > 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(map(torch.equal, before[1], made.parameters.values()))
    assert all(p.grad is None for p in made.parameters.values())


def test_peak_begins_anew_and_rises():
    peak = Peak(torch.device("cpu"))
    if not peak.known:
        return
    first = peak.bytes()
    size = 64 * 2**20
    assert first is not None
    with mmap.mmap(-1, size) as ballast:  # new pages; what torch asks for may be memory that was freed and kept
        ballast.write(b"1" * size)
        assert peak.bytes() >= first + size // 2


def test_a_system_that_does_not_tell_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_RESET", tmp_path / "no" / "clear_refs")
    assert Peak(torch.device("cpu")).bytes() is None
