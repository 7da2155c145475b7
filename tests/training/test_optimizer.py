from __future__ import annotations

import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import trained
from bertology_serve.training.methods import make_live, make_optimizer, moments, set_moments, set_rate
from bertology_serve.training.train_config import HEAD_RATE, LEARNING_RATES, TrainConfig
from tests.training.live import trainer


def test_biases_and_norms_do_not_decay_and_rates_are_the_methods(bert: Encoder):
    config = TrainConfig.of("classification", "lora,bitfit,prompt", labels=("a", "b"), max_length=32, weight_decay=0.1)
    live = make_live(bert, config, config.task_spec(config.form.labels))
    groups = make_optimizer(live, config).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    named = {name: found.pop(id(p)) for name, p in trained(live).items()}
    assert not found, "parameters that are not trained"
    assert named["tensors.lora-query-a"] == (LEARNING_RATES["lora"], 0.1)
    assert named["tensors.bitfit-ffn_norm"] == (LEARNING_RATES["bitfit"], 0.0)
    assert named["tensors.prompt-vectors"] == (LEARNING_RATES["prompt"], 0.1)
    heads = {value for name, value in named.items() if name.startswith("head.")}
    assert heads == {(HEAD_RATE, 0.1), (HEAD_RATE, 0.0)}


def test_full_fine_tuning_trains_the_encoder_and_spares_its_norms(bert: Encoder):
    config = TrainConfig.of("classification", "full", labels=("a", "b"), max_length=32, weight_decay=0.1)
    live = make_live(bert, config, config.task_spec(config.form.labels))
    decay = {id(p): g["weight_decay"] for g in make_optimizer(live, config).param_groups for p in g["params"]}
    weights = dict(bert.model.named_parameters())
    assert decay[id(weights["encoder.layer.0.attention.self.query.weight"])] == 0.1
    assert decay[id(weights["encoder.layer.0.attention.self.query.bias"])] == 0.0
    assert decay[id(weights["encoder.layer.0.attention.output.LayerNorm.weight"])] == 0.0


def test_moments_come_back(bert: Encoder):
    config = TrainConfig.of("classification", labels=("a", "b"), max_length=32)
    live = make_live(bert, config, config.task_spec(config.form.labels))
    parameters, first = trained(live), make_optimizer(live, config)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    first.step()
    second = make_optimizer(live, config)
    set_moments(second, parameters, moments(first, parameters))
    for parameter in parameters.values():
        for moment, value in first.state[parameter].items():
            assert torch.equal(second.state[parameter][moment], value)
            assert second.state[parameter][moment].data_ptr() != value.data_ptr()


def test_rate_is_a_share_of_the_highest(bert: Encoder):
    config = TrainConfig.of("classification", "probe", labels=("a", "b"), max_length=32, learning_rate=0.5)
    optimizer = make_optimizer(make_live(bert, config, config.task_spec(config.form.labels)), config)
    assert [set_rate(optimizer, 0.5), set_rate(optimizer, 0.1)] == [0.25, 0.05]


def test_beta_and_epsilon_are_the_configuration_s(bert: Encoder):
    made = trainer(bert, beta2=0.98, epsilon=1e-6)
    assert {(group["betas"], group["eps"]) for group in made.optimizer.param_groups} == {((0.9, 0.98), 1e-6)}
