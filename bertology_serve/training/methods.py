"""From a configuration to a live delta: its kinds' specs, its parameters, and how many they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import LimitError, SpecError
from bertology_serve.kinds.kind import spec_from_dict
from bertology_serve.kinds.kinds import kind_named
from bertology_serve.tasks.classification import LabelTask
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import REGRESSION, TaskSpec
from bertology_serve.training.batches import Item
from bertology_serve.training.layers import checkpointing, train_upper_layers
from bertology_serve.training.method_options import MIXOUT, REGULARISED, ChildTuning, Mixout, TopK, read_options
from bertology_serve.training.optimizer import trained
from bertology_serve.training.regularisers import ChildNetwork, MixedWeights, Regulariser
from bertology_serve.training.train_config import ALONE, TrainConfig

UNSURE = 0.2


def specs_for(config: TrainConfig) -> tuple[Any, ...]:
    """The specs of the configuration's kinds; none for ``probe``, ``full`` and its forms. Raises SpecError."""
    names = [name for name in config.method if name not in ALONE]
    return tuple(spec_from_dict(kind_named(name), config.options.get(name, {})) for name in names)


def make_live(encoder: Encoder, config: TrainConfig, spec: TaskSpec) -> TrainableDelta:
    """A fresh delta on that encoder. Raises SpecError where nothing would be trained, LimitError for long sequences."""
    if spec.max_length > encoder.max_tokens:
        raise LimitError(
            f"max_length is {spec.max_length}, but {encoder.name} reads at most {encoder.max_tokens} tokens; lower it"
        )
    live = TrainableDelta(encoder, specs_for(config), spec, config.optim.seed, full=config.full)
    wanted = config.full and config.method != (MIXOUT,)
    live.trunk_dropout = wanted if config.optim.trunk_dropout is None else config.optim.trunk_dropout
    options = _form(config)
    if isinstance(options, TopK):
        train_upper_layers(live, options.layers)
    if config.machine.checkpointing:
        live.around = checkpointing(live)
    if not trained(live):
        raise SpecError(f"method {','.join(config.method)} trains nothing for {spec.kind}, which has no head; add lora")
    return live


def regulariser_for(live: TrainableDelta, config: TrainConfig) -> Regulariser:
    """What is done around each step; ``live`` still stands where training starts."""
    options = _form(config)
    if isinstance(options, Mixout):
        return MixedWeights(live, options)
    return ChildNetwork(live, options) if isinstance(options, ChildTuning) else Regulariser(live)


def _form(config: TrainConfig) -> Mixout | ChildTuning | TopK | None:
    """The options of a regularised form of full fine-tuning."""
    name = config.method[0]
    return read_options(name, config.options.get(name, {})) if name in REGULARISED else None


def start_at_mean(live: TrainableDelta, items: Sequence[Item]) -> None:
    """Regression begins at the mean of the training scores, so that steps are spent on what explains them."""
    bias = live.head.layers[-1].linear.bias if live.task.kind == REGRESSION else None  # type: ignore[union-attr]
    if bias is not None:
        with torch.no_grad():
            bias.fill_(sum(float(item.target) for item in items) / len(items))  # type: ignore[operator]


def begin_at_probe(live: TrainableDelta, head: Mapping[str, Tensor]) -> None:
    """The head begins at a solved probe's: with the same answers, but a fifth as sure of them where they are labels.

    A probe of few rows has next to nothing left to learn on them, so that the features would stay as they are; the less
    sure it is, the more of the gradient reaches the delta.
    """
    share = UNSURE if isinstance(task_for(live.task), LabelTask) else 1.0
    live.head.adopt({name: share * tensor for name, tensor in head.items()})


@dataclass(frozen=True)
class ParameterCount:
    """Trained parameters of the components (or the encoder), of the head, and the encoder's own."""

    delta: int
    head: int
    encoder: int

    @property
    def trained(self) -> int:
        """All that is trained."""
        return self.delta + self.head

    @property
    def share(self) -> float:
        """Trained parameters as a share of encoder and head."""
        return self.trained / (self.encoder + self.head)


def count_parameters(live: TrainableDelta) -> ParameterCount:
    """Counts what a live delta trains."""
    sizes = {name: parameter.numel() for name, parameter in trained(live).items()}
    head = sum(size for name, size in sizes.items() if name.startswith("head."))
    encoder = sum(parameter.numel() for parameter in live.encoder.model.parameters())
    return ParameterCount(sum(sizes.values()) - head, head, encoder)
