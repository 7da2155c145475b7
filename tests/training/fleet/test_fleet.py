"""A fleet gives each delta the weights that it would have had alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import SpecError
from bertology_serve.training.fleet.fleet import Fleet, Member, joined, pieces
from bertology_serve.training.train import prepare
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import Trainer
from tests import tiny
from tests.training import sets

NINE: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "options": {"lora": {"rank": 2, "targets": ("key", "value")}}},
    "upper": {"method": "lora", "options": {"lora": {"rank": 5, "layers": (2,)}}, "clip": 0.05, "batch_size": 3},
    "bitfit": {"method": "bitfit", "task": "regression", "schedule": "cosine"},
    "houlsby": {"method": "adapter", "task": "token-classification", "weight_decay": 0.3},
    "pfeiffer": {"method": "adapter", "options": {"adapter": {"preset": "pfeiffer", "drop_lowest": 1}}, "seed": 3},
    "prompt": {"method": "prompt", "task": "multiple-choice", "learning_rate": 0.05, "max_tokens": 30},
    "prefix": {"method": "prefix,lora", "task": "embedding"},
    "probe": {"method": "probe", "batch_size": 7},
    "factors": {"method": "ia3,norms"},
}


def ready(encoder: Encoder, values: dict[str, Any], **more: Any) -> tuple[Any, ...]:
    """What a trainer takes: live delta, task, items, configuration, dev items."""
    values = {
        "task": "classification",
        "batch_size": 4,
        "learning_rate": 5e-3,
        "max_length": 32,
        "epochs": 3,
        "start": "random",
        **values,
        **more,
    }
    config = TrainConfig.of(**values)
    source = sets.source(config.task)
    made = prepare(config, encoder, source, source)
    made.live.to(encoder.dtype)
    return made.live, made.task, made.items, config, made.dev


def member(encoder: Encoder, name: str, values: dict[str, Any], **more: Any) -> Member:
    return Member(name, *ready(encoder, values, **more))


def weights(one: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in one.parameters.items()}


def without_dropout(one: Trainer) -> Trainer:
    for module in one.live.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return one


@pytest.fixture
def double(bert: Encoder) -> Encoder:
    bert.model.double()
    return bert


@pytest.mark.parametrize(("max_tokens", "count"), [(10_000, 20), (100, 3)])
def test_nine_together_are_nine_runs(double: Encoder, max_tokens: int, count: int):
    steps = {"max_steps": count, "epochs": 20, "keep": "last", "eval_every": 20}
    alone = {name: without_dropout(Trainer(*ready(double, values, **steps))) for name, values in NINE.items()}
    starts = {name: weights(one) for name, one in alone.items()}
    together = [without_dropout(member(double, name, values, **steps)) for name, values in NINE.items()]
    for one in alone.values():
        one.run()
    Fleet(together, max_tokens).run()
    for one in together:
        solo = alone[one.name]
        assert one.state.step == solo.state.step == count
        assert one.state.metrics == pytest.approx(solo.state.metrics, abs=1e-9)
        for name, parameter in one.parameters.items():
            assert parameter.dtype == torch.float64
            assert not torch.equal(starts[one.name][name], parameter), (one.name, name)
            assert (parameter - solo.parameters[name]).abs().max() < 1e-9, (one.name, name)


def test_dropout_of_the_head_is_that_of_a_run_alone(double: Encoder):
    values = {"method": "lora", "max_steps": 6}
    solo = Trainer(*ready(double, values))
    solo.run()
    dry = without_dropout(Trainer(*ready(double, values)))
    dry.run()
    together = [member(double, "a", values), member(double, "b", {**values, "method": "bitfit"})]
    Fleet(together).run()
    name = "tensors.lora-value-b"
    assert (together[0].parameters[name] - solo.parameters[name]).abs().max() < 1e-9
    assert (dry.parameters[name] - solo.parameters[name]).abs().max() > 1e-5


@pytest.mark.parametrize("family", ["modernbert", "deberta-v3", "mpnet"])
def test_other_families_share_passes_too(tmp_path, family: str):
    encoder = tiny.encoder(family, tmp_path)
    encoder.model.double()
    chosen = ("lora", "upper", "houlsby", "pfeiffer", "prompt")
    alone = {name: without_dropout(Trainer(*ready(encoder, NINE[name], max_steps=3))) for name in chosen}
    for one in alone.values():
        one.run()
    together = [without_dropout(member(encoder, name, NINE[name], max_steps=3)) for name in chosen]
    Fleet(together, 100).run()
    for one in together:
        for name, parameter in one.parameters.items():
            assert (parameter - alone[one.name].parameters[name]).abs().max() < 1e-9, (one.name, name)


def test_each_stops_by_itself(bert: Encoder):
    stopping = {"learning_rate": 1e-12, "head_learning_rate": 1e-12, "patience": 1, "epochs": 50, "keep": "last"}
    together = [member(bert, "stops", stopping), member(bert, "short", {"max_steps": 2}), member(bert, "long", {})]
    ended: list[str] = []
    Fleet(together, finished=lambda one: ended.append(one.name)).run()
    assert ended == ["short", "stops", "long"]
    assert [one.state.step for one in together] == [8, 2, 12]
    assert together[0].state.stopped


def test_one_that_fails_leaves_the_others_alone(double: Encoder):
    solo = without_dropout(Trainer(*ready(double, {"max_steps": 4})))
    solo.run()
    together = [without_dropout(member(double, name, {"max_steps": 4})) for name in ("sick", "well")]
    with torch.no_grad():
        together[0].parameters["tensors.lora-query-a"].fill_(float("nan"))
    Fleet(together).run()
    assert together[0].failure.startswith("step 1: the loss is")
    assert together[1].failure == ""
    for name, parameter in together[1].parameters.items():
        assert (parameter - solo.parameters[name]).abs().max() < 1e-9


def test_members_share_passes_with_those_of_the_same_depth(bert: Encoder):
    together = [member(bert, name, values) for name, values in NINE.items()]
    assert {one.name: one.lowest for one in together} == {
        **dict.fromkeys(NINE, 0), "upper": 2, "pfeiffer": 1, "probe": 3
    }  # fmt: skip
    cut = [piece for one in together for piece in pieces(one, one.items[:4], 1000)]
    groups = joined(cut, 1000, padded=False)
    assert [{piece.member.lowest for piece in group} for group in groups] == [{0}, {1}, {2}, {3}]
    assert sum(map(len, groups)) == len(cut)
    small = joined(cut, 80, padded=False)
    assert all(len(group) == 1 or sum(piece.tokens for piece in group) <= 80 for group in small)
    assert max(map(len, small)) > 1
    padded = joined(cut, 100, padded=True)
    rows = [sum(p.sequences for p in group) * max(p.longest for p in group) for group in padded]
    assert all(count <= 100 or len(group) == 1 for count, group in zip(rows, padded, strict=True))


@pytest.mark.parametrize("method", ["full", "mixout", "top-k"])
def test_what_changes_the_encoder_cannot_join(bert: Encoder, method: str):
    with pytest.raises(SpecError, match=f"one: a fleet shares one frozen encoder, but {method} trains its own"):
        member(bert, "one", {"method": method})


def test_members_must_agree_on_what_they_share(bert: Encoder, bert_path):
    one = member(bert, "one", {})
    with pytest.raises(SpecError, match="precision is 'bf16' for two and 'auto' for one"):
        Fleet([one, member(bert, "two", {"precision": "bf16"})])
    with pytest.raises(SpecError, match="trunk_dropout is True for two and False for one"):
        Fleet([one, member(bert, "two", {"trunk_dropout": True})])
    with pytest.raises(SpecError, match="two and one have different encoders"):
        Fleet([one, member(Encoder.load(str(bert_path)), "two", {})])
    with pytest.raises(SpecError, match="the fleet has no members"):
        Fleet([])
