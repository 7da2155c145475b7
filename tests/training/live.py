"""A live delta on the tiny encoder, and its trainer, as the tests of the methods want them."""

from __future__ import annotations

from typing import Any

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.training.train import prepare
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import Trainer
from tests.training import sets


def trainer(encoder: Encoder, task: str = "classification", **values: Any) -> Trainer:
    """A trainer that has not begun."""
    config = TrainConfig.of(task, **{"max_length": 32, "batch_size": 5, **values})
    made = prepare(config, encoder, sets.source(task))
    return Trainer(made.live, made.task, made.items, config)
