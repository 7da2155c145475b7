"""AdamW over a delta under training, its learning rates and their schedule, and the precision that a device has."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import AdamW

from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.training.train_config import TrainConfig

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def trained(live: TrainableDelta) -> dict[str, torch.nn.Parameter]:
    """The parameters under training by name, in a fixed order."""
    return {name: parameter for name, parameter in live.named_parameters() if parameter.requires_grad}


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
