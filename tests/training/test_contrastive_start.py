"""A delta of few rows begins where texts of one label were brought together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import SpecError
from bertology_serve.training import contrastive_start
from bertology_serve.training.contrastive_start import bring_together, pair_loss
from bertology_serve.training.evaluation import evaluate
from bertology_serve.training.frozen_rows import pooled
from bertology_serve.training.recipes import stages
from bertology_serve.training.run_directory import Destination
from bertology_serve.training.train import Prepared, first_of, prepare, train
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import Trainer
from tests.training import sets

CONFIG = TrainConfig.of("classification", start="contrastive", learning_rate=1e-2, pooling="mean")


@pytest.fixture
def ready(bert: Encoder) -> Prepared:
    dev = sets.source("classification", "dev.jsonl")
    return prepare(stages(CONFIG)[-1].config, bert, sets.source("classification"), dev)


def test_the_loss_is_that_of_all_pairs_of_the_batch():
    rows, labels = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double(), [0, 1, 0, 2, 1, 0, 3]
    cosines = cosine_similarity(rows.numpy())
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    near = np.mean([(1 - cosines[i, j]) ** 2 for i, j in pairs if labels[i] == labels[j]])
    far = np.mean([cosines[i, j] ** 2 for i, j in pairs if labels[i] != labels[j]])
    assert float(pair_loss(rows, torch.tensor(labels))) == pytest.approx(near + far, rel=1e-5)
    assert float(pair_loss(rows[:3], torch.tensor([0, 0, 0]))) > 0, "one label"
    assert float(pair_loss(rows[:1], torch.tensor([0]))) == 0, "one text"


def apart(ready: Prepared) -> float:
    """By how much texts of one label are nearer than those of two."""
    depth = ready.live.encoder.anatomy.layers
    cosines = cosine_similarity(pooled(ready.live, ready.items, (depth,), 512)[depth].numpy())
    same = np.equal.outer(*[[item.target for item in ready.items]] * 2)
    return float(cosines[same].mean() - cosines[~same].mean())


def test_texts_of_one_label_come_together_and_the_head_tells_them_apart(ready: Prepared):
    before = apart(ready)
    bring_together(ready.live, ready.task, ready.items, CONFIG)
    assert apart(ready) > before + 0.5
    with torch.no_grad():
        found = ready.live([one for item in ready.items for one in item.encodings]).argmax(1)
    assert found.tolist() == [item.target for item in ready.items]


def test_it_is_the_same_whatever_was_drawn_before(bert: Encoder):
    ends = []
    for seed in (1, 2):
        one = prepare(stages(CONFIG)[-1].config, bert, sets.source("classification"))
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        bring_together(one.live, one.task, one.items, CONFIG)
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(one.live.freeze("one"))
    assert all(torch.equal(ends[0].tensors[name], ends[1].tensors[name]) for name in ends[0].tensors)


@pytest.mark.parametrize("metric", [0.0, 1.0])
def test_the_dev_set_decides_whether_it_stays(ready: Prepared, metric: float):
    """Beside a start that it beats it is the best state yet; beside one that is perfect it is undone."""
    stage = stages(CONFIG)[-1]
    trainer = Trainer(ready.live, ready.task, ready.items, stage.config.replaced(patience=1), ready.dev)
    trainer.begin_at({"accuracy": metric, "loss": 9.0 if not metric else 0.0}, first_of(stage, ready.live, ready))
    before = {name: tensor.clone() for name, tensor in ready.live.named_tensors().items()}
    trainer.prepare()
    moved = any(not torch.equal(before[name], tensor) for name, tensor in ready.live.named_tensors().items())
    found = (moved, bool(trainer.best), trainer.unimproved, trainer.state.start)
    assert found == ((True, True, False, "contrastive") if not metric else (False, False, True, "probe"))
    assert trainer.state.seconds > 0
    assert not trainer.done, "one that is undone is no evaluation that patience counts"


@pytest.mark.parametrize(("asked", "steps"), [({}, 0), ({"epochs": 1}, 1), ({"max_steps": 1}, 1)])
def test_without_a_dev_set_it_is_all_unless_steps_are_asked_for(
    bert: Encoder, tmp_path: Path, asked: dict[str, int], steps: int
):
    outcome = train(CONFIG.replaced(**asked), bert, sets.source("classification"), place=Destination(tmp_path / "mine"))
    assert (outcome.state.step, outcome.delta.kinds) == (steps, ("lora",))
    assert (outcome.delta.provenance["start"], outcome.baselines) == ("contrastive", {}), "no dev set measures a probe"
    answers = evaluate(outcome.delta, sets.source("classification").records, bert).metrics
    assert answers["accuracy"] == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "regression"},
        {"method": "full"},
        {"method": "probe"},
        {"head": "hf"},
        {"recipe": "lp-ft"},
        {"aggregate": "max"},
    ],
)
def test_what_it_is_not_for(wrong: dict[str, str]):
    with pytest.raises(SpecError, match="start contrastive.*" + "".join(wrong.values())):
        TrainConfig.of(**{"task": "classification", "start": "contrastive", **wrong})


def test_batches_of_long_texts_are_cut(ready: Prepared, monkeypatch: pytest.MonkeyPatch):
    batch = ready.items
    monkeypatch.setattr(contrastive_start, "LEAST", 2)
    for most, count in ((10**6, len(batch)), (1, 2), (sum(item.tokens for item in batch[:3]), 3)):
        monkeypatch.setattr(contrastive_start, "TOKENS", most)
        assert contrastive_start._cut(batch) == batch[:count]
