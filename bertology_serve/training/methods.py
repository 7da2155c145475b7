"""From a configuration to a live delta: its kinds' specs, its parameters, how many they are; and AdamW over those,
its learning rates and their schedule, and the precision that a device has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import AdamW

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import TrainableDelta, checkpointing, train_upper_layers, trained
from bertology_serve.errors import LimitError, SpecError
from bertology_serve.kinds.kinds import kind_named, spec_from_dict
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.base import Item
from bertology_serve.tasks.classification import LabelTask
from bertology_serve.tasks.heads import CHUNK, Layer
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import REGRESSION, SPARSE, Encoding, TaskSpec
from bertology_serve.training.method_options import (
    MIXOUT,
    REGULARISED,
    ChildTuning,
    Mixout,
    TopK,
    read_layers,
    read_options,
)
from bertology_serve.training.regularisers import ChildNetwork, MixedWeights, Regulariser
from bertology_serve.training.train_config import ALONE, TrainConfig

UNSURE = 0.2
FEW_TEXTS, FEW_WORDS = 64, 16
"""How many texts say what scores are usual, and how many words of the vocabulary a row has at first."""


def specs_for(config: TrainConfig, anatomy: Anatomy) -> tuple[Any, ...]:
    """The specs of the configuration's kinds; none for ``probe``, ``full`` and its forms. Raises SpecError.

    A kind's own ``layers`` come before the configuration's.
    """
    names = [name for name in config.method if name not in ALONE]
    specs = [spec_from_dict(kind_named(name), config.options.get(name, {})) for name in names]
    layers = read_layers(config.layers, anatomy.layers)
    return tuple(replace(spec, layers=layers) if layers and spec.layers is None else spec for spec in specs)


def make_live(encoder: Encoder, config: TrainConfig, spec: TaskSpec) -> TrainableDelta:
    """A fresh delta on that encoder. Raises SpecError where nothing would be trained, LimitError for long sequences."""
    if spec.max_length > encoder.max_tokens:
        raise LimitError(
            f"max_length is {spec.max_length}, but {encoder.name} reads at most {encoder.max_tokens} tokens; lower it"
        )
    if max(spec.dimensions, default=0) > encoder.anatomy.hidden:
        raise SpecError(
            f"matryoshka is {','.join(map(str, spec.dimensions))}; the embeddings of {encoder.name} have "
            f"{encoder.anatomy.hidden} numbers: expected widths up to that"
        )
    live = TrainableDelta(encoder, specs_for(config, encoder.anatomy), spec, config.optim.seed, full=config.full)
    wanted = config.full and config.method != (MIXOUT,)
    live.trunk_dropout = wanted if config.optim.trunk_dropout is None else config.optim.trunk_dropout
    options = _form(config)
    if isinstance(options, TopK):
        train_upper_layers(live, options.layers)
    if config.machine.checkpointing:
        live.around = checkpointing(live)
    if not trained(live):
        raise SpecError(
            f"method {','.join(config.method)} trains nothing for {spec.kind}, which has no head of its own; add lora"
        )
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


def start_at_data(live: TrainableDelta, items: Sequence[Item]) -> None:
    """A fresh head begins at what the training data say without a step, so that steps are spent on what explains them.

    Regression at the mean of the scores. Sparse embeddings, where the base checkpoint lacks the head: its first layer
    is the identity where it is square (rows of a sentence encoder are still near their words' embeddings), and biases
    let a row have 16 words, were the scores of each word in some texts' rows normal.
    """
    if live.task.kind == REGRESSION:
        bias = live.head.layers[-1].linear.bias  # type: ignore[union-attr]
        if bias is not None:
            with torch.no_grad():
                bias.fill_(sum(float(item.target) for item in items) / len(items))  # type: ignore[operator]
    elif live.task.kind == SPARSE:
        drawn = {name for name, base, _ in live.head.named() if base not in live.encoder.base_head}
        first, words = (cast(Layer, layer) for layer in live.head.layers)
        if f"{first.form.path}.weight" in drawn and first.form.inputs == first.form.outputs:
            torch.nn.init.eye_(first.linear.weight)
        if f"{words.form.path}.bias" in drawn:
            encodings = [one for item in items[:FEW_TEXTS] for one in item.encodings][:FEW_TEXTS]
            with torch.no_grad():
                words.linear.bias.sub_(_high_scores(live, encodings))


@torch.no_grad()
def _high_scores(live: TrainableDelta, encodings: Sequence[Encoding]) -> Tensor:
    """[V]: what few of these texts' rows score of each word, so that a row has ``FEW_WORDS`` above it."""
    mode = live.training
    hidden, batch = live.eval().hidden(encodings)
    sums = torch.zeros(2, live.task.width, dtype=torch.float64, device=hidden.device)
    for rows in torch.split(hidden[batch.text_rows].float(), CHUNK):
        scores = live.head(rows).double()
        sums += torch.stack([scores.sum(0), scores.square().sum(0)])
    live.train(mode)
    mean, square = sums / len(batch.text_rows)
    deviations = NormalDist().inv_cdf(1 - min(0.5, FEW_WORDS / live.task.width))
    high: Tensor = mean + deviations * (square - mean.square()).clamp_min(0).sqrt()
    return high.float()


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


MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def make_optimizer(live: TrainableDelta, config: TrainConfig) -> AdamW:
    """AdamW with one group for each learning rate and decay; ``initial_rate`` is each group's highest rate."""
    spared = live.no_decay()
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in trained(live).items():
        key = (_rate(name, config), 0.0 if name in spared else config.optim.weight_decay)
        groups.setdefault(key, []).append(parameter)
    return AdamW(
        [
            {"params": parameters, "lr": rate, "initial_rate": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        betas=(0.9, config.optim.beta2),
        eps=config.optim.epsilon,
        fused=True,
    )


def _rate(name: str, config: TrainConfig) -> float:
    """The highest learning rate of a parameter; its name begins with ``tensors.KIND-``, ``head.`` or ``model.``."""
    if name.startswith("head."):
        return config.head_rate
    kind = name.removeprefix("tensors.").partition("-")[0]
    return config.rate(kind if kind in config.method else config.method[0])


def set_rate(optimizer: AdamW, share: float) -> float:
    """Sets every group to a share of its highest rate; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_rate"] * share
    return float(optimizer.param_groups[0]["lr"])


def moments(optimizer: AdamW, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state as tensors named ``MOMENT.PARAMETER``."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        if optimizer.state[parameter]
        for moment in MOMENTS
    }


def set_moments(optimizer: AdamW, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """The inverse of ``moments``."""
    for name, parameter in parameters.items():
        if f"step.{name}" in values:
            optimizer.state[parameter] = {
                moment: values[f"{moment}.{name}"].to(parameter.device, copy=True) for moment in MOMENTS
            }


def state_bytes(optimizer: AdamW) -> int:
    """Bytes of all that the optimizer remembers."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """The share of the highest learning rate that step ``step`` (from 0) of ``total`` uses.

    It rises linearly over the first ``warmup * total`` steps, then falls to 0 at ``total`` (``linear``, or half a
    ``cosine``) or stays (``constant``). The first step already learns.
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, total - rising)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether ``precision`` means bf16 there: ``auto`` does on GPUs that have it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"
