"""A delta under training: gradients are those of finite differences, and what is frozen answers the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.linear import available
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import LimitError
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny

KINDS: dict[str, list[Any]] = {
    "lora": [Lora(("query", "value", "output", "up", "down"), rank=2)],
    "bitfit": [Bitfit()],
    "houlsby": [Adapter(width=3)],
    "pfeiffer": [Adapter("pfeiffer", 3, activation="tanh", drop_lowest=1)],
    "prompt": [Prompt(2)],
    "prefix": [Prefix(2)],
    "probe": [],
    "all": [Lora(rank=1), Bitfit(), Adapter("pfeiffer", 2, "both", "gelu"), Prompt(1), Prefix(1)],
}
TASK = TaskSpec("classification", ("x", "y", "z"), 24)
STEP = 1e-3  # transformers rotates queries and keys in float32, which a smaller step would see
TEXTS = ("the cat was good", "dog", "Ada met the cold river , late", "the house")


def made(encoder: Encoder, specs: list[Any], task: TaskSpec = TASK) -> tuple[TrainableDelta, list[Any], list[int]]:
    """A live delta away from its zero start, four encodings and their targets."""
    live = TrainableDelta(encoder, specs, task, seed=1)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    tasks = task_for(task)
    encodings = [tasks.encode(tasks.example({"text": t}, "x", False), encoder.tokenizer)[0] for t in TEXTS]
    return live.eval(), encodings, [0, 2, 1, 1]


def loss_of(live: TrainableDelta, encodings: list[Any], targets: list[int]) -> torch.Tensor:
    """The cross-entropy in the module's own precision."""
    return F.cross_entropy(live(encodings), torch.tensor(targets))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v3"])
def test_gradients_equal_finite_differences(kinds: str, family: str, tmp_path: Path) -> None:
    encoder = tiny.encoder(family, tmp_path)
    encoder.model.double()
    live, encodings, targets = made(encoder, KINDS[kinds])
    live.double()
    loss_of(live, encodings, targets).backward()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in live.named_parameters():
        if not parameter.requires_grad:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        step = STEP * direction / direction.norm()
        with torch.no_grad():
            parameter.add_(step)
            above = loss_of(live, encodings, targets)
            parameter.sub_(2 * step)
            below = loss_of(live, encodings, targets)
            parameter.add_(step)
        assert parameter.grad is not None, name
        slope = float((parameter.grad * step).sum() / STEP)
        assert slope == pytest.approx(float(above - below) / (2 * STEP), rel=5e-3, abs=1e-4), name


@pytest.mark.parametrize("kinds", KINDS)
def test_a_frozen_delta_answers_what_the_live_one_did(kinds: str, tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    live, encodings, _ = made(encoder, KINDS[kinds])
    pipeline = Pipeline(encoder)
    pipeline.add(live.freeze("d"))
    jobs = [pipeline.prepare(Request("d", {"text": text}, logits=True)) for text in TEXTS]
    answers = torch.tensor([prediction.answer["logits"] for prediction in pipeline.run(jobs)])
    with torch.inference_mode():
        torch.testing.assert_close(answers, live(encodings), atol=1e-6, rtol=1e-5)


def test_the_frozen_encoder_gets_no_gradient_and_full_tuning_all(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    live, encodings, targets = made(encoder, KINDS["lora"])
    loss_of(live, encodings, targets).backward()
    assert all(parameter.grad is None for parameter in encoder.model.parameters())
    full = TrainableDelta(encoder, [], TASK, full=True)
    loss_of(full, encodings, targets).backward()
    unread = {"model.embeddings.token_type_embeddings.weight"}
    assert {n for n, p in full.named_parameters() if p.grad is None} <= unread


def test_prepacked_training_has_the_same_gradients(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    live, encodings, targets = made(encoder, KINDS["all"])
    loss_of(live, encodings, targets).backward()
    plain = {name: p.grad.clone() for name, p in live.named_parameters() if p.grad is not None}
    live.zero_grad()
    assert encoder.prepack(True)
    loss_of(live, encodings, targets).backward()
    for name, parameter in live.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, plain[name], atol=2e-6, rtol=1e-4)


@pytest.mark.skipif(not available(torch.bfloat16), reason="this processor's oneDNN has no bfloat16")
def test_training_in_bf16_has_nearly_the_same_gradients(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    live, encodings, targets = made(encoder, KINDS["all"])
    loss_of(live, encodings, targets).backward()
    exact = torch.cat([p.grad.flatten() for p in live.parameters() if p.grad is not None])
    live.zero_grad()
    assert encoder.prepack(True)
    with encoder.rounded():
        loss_of(live, encodings, targets).backward()
    assert encoder.prepacked
    assert next(encoder._linears()).prepacked.dtype == torch.float32
    rounded = torch.cat([p.grad.flatten() for p in live.parameters() if p.grad is not None])
    assert rounded.dtype == torch.float32
    assert 1e-5 < (rounded - exact).norm() / exact.norm() < 0.1


def test_decay_spares_biases_and_norms(tmp_path: Path) -> None:
    live = TrainableDelta(tiny.encoder("modernbert", tmp_path), KINDS["all"], TASK)
    assert live.no_decay() == {
        name for name, _ in live.named_parameters() if "bias" in name or "bitfit" in name or "norm" in name
    }


def test_a_sequence_limit_beyond_the_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LimitError, match="reads at most 64 tokens"):
        TrainableDelta(tiny.encoder("bert", tmp_path), [], TaskSpec("regression", max_length=65))


def test_dropout_of_lora_acts_in_training_only(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    live, encodings, _ = made(encoder, [Lora(dropout=0.5)])
    with torch.inference_mode():
        still = live(encodings)
        assert torch.equal(live(encodings), still)
        pipeline = Pipeline(encoder)
        pipeline.add(live.freeze("d"))
        answer = pipeline.run([pipeline.prepare(Request("d", {"text": TEXTS[0]}, logits=True))])[0]
        torch.testing.assert_close(torch.tensor(answer.answer["logits"]), still[0], atol=1e-6, rtol=1e-5)
        live.train()
        live.head.eval()
        assert not torch.allclose(live(encodings), still)
