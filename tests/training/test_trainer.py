from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import trained
from bertology_serve.errors import LimitError, SpecError
from bertology_serve.tasks.spec import VECTOR_KINDS
from bertology_serve.training.methods import make_live
from bertology_serve.training.run_directory import RunDirectory
from bertology_serve.training.train import Prepared, prepare
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import NoCallback, Trainer
from tests import tiny
from tests.bits import same_bits
from tests.training import sets

MACHINE = {"prepacked": False}
HEADS = {"embedding": "none", "zero-shot": "none", "sparse": "hf", "multi-vector": "hf"}
SLOW = {"sparse": {"method": "lora", "epochs": 60}}  # products of weights are no cosines: nothing makes them sharp
REACHED = dict.fromkeys(VECTOR_KINDS, 0.75)  # the most that scores of two values allow


def ready(encoder: Encoder, task: str, **values: Any) -> tuple[TrainConfig, Prepared]:
    defaults = {"max_length": sets.LENGTHS.get(task, 32), "batch_size": 5, "start": "random"}
    config = TrainConfig.of(task, **{**defaults, "head_learning_rate": values.get("learning_rate"), **values})
    return config, prepare(config, encoder, sets.source(task), sets.source(task, "dev.jsonl"))


def trainer(encoder: Encoder, task: str, directory: RunDirectory | None = None, **values: Any) -> Trainer:
    config, made = ready(encoder, task, **values)
    return Trainer(made.live, made.task, made.items, config, made.dev, directory)


def parameters(one: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trained(one.live).items()}


@pytest.mark.parametrize("task", sets.SETS)
def test_micro_batches_give_the_gradient_of_the_whole_batch(bert: Encoder, task: str):
    method = "lora" if task in ("embedding", "zero-shot") else "lora,bitfit"
    gradients, losses = [], []
    for max_tokens in (10_000, 30, 1):
        one = trainer(bert, task, method=method, max_tokens=max_tokens)
        one.live.eval()
        losses.append(one.gradient(one.items))
        gradients.append({name: parameter.grad for name, parameter in one.parameters.items()})
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)
    norm = torch.cat([gradient.flatten() for gradient in gradients[0].values()]).norm()
    assert norm > 1e-2
    for name, whole in gradients[0].items():
        for cut in gradients[1:]:
            assert torch.linalg.norm(cut[name] - whole) <= 1e-4 * torch.linalg.norm(whole) + 1e-6 * norm, name


@pytest.mark.parametrize("task", sets.SETS)
def test_every_task_is_learnt(bert: Encoder, task: str):
    settings = {"method": "full", "epochs": 25, "learning_rate": 3e-3, "head": HEADS.get(task, "linear")}
    one = trainer(bert, task, keep="last", **{**settings, **SLOW.get(task, {})})
    before = one.gradient(one.items)
    one.optimizer.zero_grad()
    one.run()
    assert one.gradient(one.items) < 0.3 * before
    assert one.state.metrics[one.task.main_metric] > REACHED.get(task, 0.9)


@pytest.mark.parametrize("method", ["lora", "bitfit", "adapter", "prompt", "prefix", "probe", "lora,prompt,adapter"])
def test_every_method_learns(bert: Encoder, method: str):
    rate = 0.05 if method in ("prompt", "prefix", "probe") else 5e-3
    head = {"pooling": "mean", "head": "linear"}
    one = trainer(bert, "classification", method=method, epochs=30, learning_rate=rate, keep="last", **head)
    before = one.gradient(one.items)
    one.optimizer.zero_grad()
    one.run()
    assert one.gradient(one.items) < 0.7 * before


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_trains_between_evaluations(tmp_path: Path, family: str):
    one = trainer(tiny.encoder(family, tmp_path), "classification", epochs=2, eval_every=1)
    start = parameters(one)
    one.run()
    assert all(not torch.equal(start[name], now) for name, now in one.parameters.items())


class Killed(Exception):
    pass


class Killer(NoCallback):
    """Stops a run without a word after so many steps."""

    def __init__(self, at: int) -> None:
        self.at = at

    def stepped(self, line: Any) -> None:
        if line["step"] == self.at:
            raise Killed


def straight_and_resumed(path: Path, bert_path: Path, kill_at: int, **values: Any) -> tuple[list[Trainer], list[Any]]:
    """The same run made in one go, and killed and resumed: the trainers and their logs without speeds."""
    runs, logs = [], []
    for name, stops in (("straight", ()), ("resumed", (kill_at,))):
        directory = RunDirectory(path / name)
        for stop in (*stops, 0):
            encoder = Encoder.load(str(bert_path))
            directory.open({}, MACHINE, resume=True)
            one = trainer(encoder, "classification", directory, **values)
            one.watcher = Killer(stop)
            torch.manual_seed(stop)  # whatever the process did before
            if stop:
                with pytest.raises(Killed):
                    one.run()
            else:
                one.run()
        runs.append(one)
        lines = [json.loads(line) for line in (directory.path / "log.jsonl").read_text().splitlines()]
        logs.append([{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines])
    return runs, logs


@same_bits
@pytest.mark.parametrize(
    "values",
    [
        {"method": "lora", "options": {"lora": {"dropout": 0.2}}},
        {"method": "adapter,bitfit,prompt", "trunk_dropout": True},
        {"method": "full", "schedule": "cosine"},
        {"method": "lora", "keep": "last", "patience": 3, "max_steps": 13},
        {"method": "mixout"},
        {"method": "child-tuning", "options": {"child-tuning": {"mode": "d"}}},
        {"method": "child-tuning", "options": {"child-tuning": {"mode": "f"}}},
        {"method": "top-k", "options": {"top-k": {"layers": 1}}},
        {"method": "probe", "bucket_batches": 2},
    ],
    ids=["dropout", "kinds", "full", "last", "mixout", "child-d", "child-f", "top-k", "buckets"],
)
@pytest.mark.parametrize("kill_at", [2, 11])
def test_resumed_run_is_the_straight_run_bit_for_bit(tmp_path, bert_path, values, kill_at):
    config = {"epochs": 4, "eval_every": 3, "save_every": 2, "learning_rate": 5e-3, **values}
    (straight, resumed), logs = straight_and_resumed(tmp_path, bert_path, kill_at, **config)
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
    assert logs[0] == logs[1]
    ours, theirs = straight.state.as_dict(), resumed.state.as_dict()
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


@same_bits
def test_a_kill_before_the_first_checkpoint_begins_again(tmp_path, bert_path):
    (straight, resumed), logs = straight_and_resumed(tmp_path, bert_path, 1, epochs=2, save_every=50)
    assert all(torch.equal(p, resumed.parameters[name]) for name, p in straight.parameters.items())
    assert logs[0] == logs[1]


def test_best_state_is_kept(bert: Encoder):
    one = trainer(bert, "classification", epochs=6, learning_rate=0.02)
    seen: list[tuple[tuple[float, float], dict[str, torch.Tensor]]] = []

    class Watch(NoCallback):
        def evaluated(self, line: Any) -> None:
            rank = (line["eval"]["accuracy"], -line["eval"]["loss"])
            seen.append((rank, parameters(one)))

    one.watcher = Watch()
    state = one.run()
    ranks = [rank for rank, _ in seen]
    index = ranks.index(max(ranks))
    assert 0 < index < len(seen) - 1, "the last state is the best: nothing is tested"
    assert state.best == list(ranks[index])
    assert state.metrics["accuracy"] == ranks[index][0]
    assert state.best_step == (index + 1) * 4
    assert all(torch.equal(now, seen[index][1][name]) for name, now in one.parameters.items())


@same_bits
def test_patience_stops_and_last_keeps_the_last(bert: Encoder):
    one = trainer(bert, "classification", epochs=50, learning_rate=1e-9, patience=2, keep="last")
    state = one.run()
    assert (state.step, state.best_step, state.stopped) == (12, 4, True)
    assert one.best == {}


def test_first_step_has_the_size_of_its_learning_rate(bert: Encoder):
    """Adam's first step moves each weight by the learning rate, times the share that warm-up allows."""
    one = trainer(bert, "classification", max_steps=1, warmup=0.0, weight_decay=0.0, learning_rate=1e-3)
    start = parameters(one)
    one.run()
    moved = (one.parameters["tensors.lora-query-b"].detach() - start["tensors.lora-query-b"]).abs()
    assert float(moved.max()) == pytest.approx(1e-3, rel=1e-3)


def test_clip_bounds_the_gradient(bert: Encoder):
    norms, moved = [], []
    for clip in (0.0, 1e-3):
        one = trainer(bert, "regression", clip=clip)
        one.live.eval()
        one.gradient(one.items)
        norms.append(one._update(1.0)[1])
        moments = [one.optimizer.state[p]["exp_avg"].flatten() for p in one.parameters.values()]
        moved.append(float(torch.cat(moments).norm()))
    assert norms[0] == norms[1] > 1e-2
    assert moved == pytest.approx([0.1 * norms[0], 0.1 * 1e-3], rel=1e-4)


def test_log_holds_what_plots_need(tmp_path, bert: Encoder):
    directory = RunDirectory(tmp_path / "d")
    directory.open({}, MACHINE, resume=False)
    trainer(bert, "classification", directory, epochs=1).run()
    lines = [json.loads(line) for line in (directory.path / "log.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_s"}
    assert [line["epoch"] for line in lines] == [0.3125, 0.625, 0.9375, 1.0, 1.0]
    assert set(lines[-1]) == {"step", "epoch", "eval"}
    assert set(lines[-1]["eval"]) == {"accuracy", "macro_f1", "mcc", "loss"}


def test_a_loss_that_explodes_stops_the_run(bert: Encoder):
    one = trainer(bert, "classification", learning_rate=1e-3)
    with torch.no_grad():
        one.parameters["tensors.lora-query-a"].fill_(float("nan"))
    message = r"step 1: the loss is .* gradient nan long; lower --learning-rate \(it is 0\.001\)"
    with pytest.raises(SpecError, match=message):
        one.run()


def test_bf16_trains_and_keeps_float32_parameters(bert: Encoder):
    one = trainer(bert, "classification", precision="bf16", epochs=20, learning_rate=1e-2)
    one.run()
    assert one.state.best[0] == 1.0
    assert {p.dtype for p in one.parameters.values()} == {torch.float32}


def test_dropout_of_the_trunk_is_a_choice(bert: Encoder):
    for chosen in (None, True):
        one = trainer(bert, "classification", trunk_dropout=chosen)
        one.live.train()
        one.live.head.eval()
        losses = {one.gradient(one.items) for _ in range(3)}
        assert len(losses) == (3 if chosen else 1)
    full = trainer(bert, "classification", method="full")
    full.live.train()
    assert bert.model.training


def test_nothing_to_train_is_refused(bert: Encoder):
    config = TrainConfig.of("embedding", "probe", max_length=32)
    with pytest.raises(SpecError, match="trains nothing for embedding, which has no head of its own"):
        make_live(bert, config, config.task_spec(()))


def test_widths_beyond_the_encoder_are_refused(bert: Encoder):
    config = TrainConfig.of("embedding", max_length=32, matryoshka=(8, 999))
    with pytest.raises(SpecError, match=r"matryoshka is 8,999; the embeddings of .* have \d+ numbers"):
        make_live(bert, config, config.task_spec(()))


def test_what_embeddings_begin_with_is_kept_where_nothing_is_better(bert: Encoder):
    """A rate that ruins the encoder: the start counts as an evaluation, and is what is kept."""
    one = trainer(bert, "embedding", method="lora", learning_rate=5.0, epochs=2)
    lines: list[dict[str, Any]] = []
    one._log = lines.append  # type: ignore[assignment,method-assign]
    one.run()
    evals = [line for line in lines if "eval" in line]
    assert [line["step"] for line in evals] == [0, one.total // 2, one.total]
    assert (one.state.best_step, one.state.metrics) == (0, evals[0]["eval"])
    assert all(not tensor.any() for name, tensor in one.parameters.items() if "lora_B" in name or name.endswith("B"))
    last = trainer(bert, "embedding", method="lora", keep="last", epochs=1)
    last.run()
    assert last.state.best_step == last.total


def test_max_length_beyond_the_encoder_is_refused(bert: Encoder):
    config = TrainConfig.of("regression", max_length=65)
    with pytest.raises(LimitError, match=r"max_length is 65, but .* reads at most 64 tokens"):
        make_live(bert, config, config.task_spec(()))


def test_regression_begins_at_the_mean(bert: Encoder):
    _, made = ready(bert, "regression")
    mean = sum(item.target for item in made.items) / len(made.items)
    assert made.live.head.own_tensors()["classifier.bias"].item() == pytest.approx(mean)
