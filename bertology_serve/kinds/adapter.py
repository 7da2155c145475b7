"""Bottleneck adapters: Houlsby et al. 2019 (arXiv 1902.00751), Pfeiffer et al. 2020 (arXiv 2005.00247), and
AdapterDrop (Rücklé et al. 2020, arXiv 2010.11918: none in the lowest layers).

Houlsby: ``h += U · act(D h + b_d) + b_u`` on the output of the attention projection and of the FFN, before the
residual is added. Pfeiffer: after the FFN only, ``o = LN(U · act(D · LN(z + x)) + z + x)``, the frozen LayerNorm used
twice. Pre-norm encoders (ModernBERT, EuroBERT) have no LayerNorm after the residual: there Pfeiffer's adapter stands
on the FFN's output, as Houlsby's second one does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bertology_serve.config_fields import check_known, named_fields
from bertology_serve.errors import SpecError
from bertology_serve.kinds.effects import Bottleneck, Effects, Layers, spread
from bertology_serve.kinds.kinds import (
    LATER,
    Kind,
    Tensors,
    check_layers,
    check_positive,
    chosen_layers,
    normal,
    uncut,
    zeros,
)
from bertology_serve.kinds.slots import DOWN, FFN_NORM, OUTPUT, Anatomy

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
PRESETS = ("houlsby", "pfeiffer")


@named_fields
@dataclass(frozen=True)
class Adapter:
    """``preset`` places the adapter (``houlsby``: ``after`` attention, FFN or both; ``pfeiffer``: after the FFN).

    ``width`` is M. ``activation`` defaults to the papers' choice (swish for Houlsby, ReLU for Pfeiffer).
    ``layers`` are those with adapters (``None``: all); ``drop_lowest`` leaves the lowest n without (AdapterDrop).
    Raises SpecError for values that make no sense.
    """

    preset: str = "houlsby"
    width: int = 64
    after: str = "both"
    activation: str | None = None
    drop_lowest: int = 0
    layers: Layers = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        check_known("preset", self.preset, PRESETS)
        check_known("after", self.after, ("both", "attention", "ffn"))
        check_positive(width=self.width)
        check_known("activation", self.nonlinearity, ACTIVATIONS)
        if self.drop_lowest < 0:
            raise SpecError(f"drop_lowest is {self.drop_lowest}; expected a number of layers from 0")
        if self.drop_lowest and self.layers is not None:
            raise SpecError("drop_lowest and layers both say which layers have adapters; leave one out")
        check_layers(self, self.layers)

    @property
    def nonlinearity(self) -> str:
        return self.activation or ("silu" if self.preset == "houlsby" else "relu")


def places(spec: Adapter, anatomy: Anatomy) -> tuple[str, ...]:
    """The slots on whose output an adapter stands."""
    if spec.preset == "pfeiffer":
        return (DOWN,) if anatomy.pre_norm or FFN_NORM not in anatomy.slots else (FFN_NORM,)
    return {"both": (OUTPUT, DOWN), "attention": (OUTPUT,), "ffn": (DOWN,)}[spec.after]


def layers(spec: Adapter, anatomy: Anatomy) -> tuple[int, ...]:
    """The layers that have adapters."""
    if spec.drop_lowest >= anatomy.layers:
        raise SpecError(f"drop_lowest is {spec.drop_lowest}, but the encoder has only {anatomy.layers} layers")
    return chosen_layers(spec.layers, anatomy.layers)[spec.drop_lowest :]


def init(spec: Adapter, anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """``{place}.down``, ``.up`` [L, M, H] near zero (N(0, 0.01²) within two deviations), biases zero, float32."""
    depth, width, hidden = len(layers(spec, anatomy)), spec.width, anatomy.hidden
    tensors: Tensors = {}
    for place in places(spec, anatomy):
        for name in ("down", "up"):
            drawn = normal((depth, width, hidden), 0.01, generator)
            if generator is not None:  # on the meta device this would import torch._dynamo
                drawn.clamp_(-0.02, 0.02)
            tensors[f"{place}.{name}"] = drawn
        tensors[f"{place}.down_bias"] = zeros((depth, width), generator)
        tensors[f"{place}.up_bias"] = zeros((depth, hidden), generator)
    return tensors


def effects(spec: Adapter, tensors: Tensors, anatomy: Anatomy) -> Effects:
    """One bottleneck a place."""
    chosen = layers(spec, anatomy)

    def stack(place: str, name: str) -> torch.Tensor:
        return spread(tensors[f"{place}.{name}"], chosen, anatomy.layers)

    return Effects(
        bottleneck={
            place: Bottleneck(
                stack(place, "down"),
                stack(place, "down_bias"),
                stack(place, "up"),
                stack(place, "up_bias"),
                spec.nonlinearity,
                chosen,
            )
            for place in places(spec, anatomy)
        }
    )


ADAPTER = Kind("adapter", Adapter, init, effects, uncut)
