"""DoRA from peft (Liu et al. 2024, arXiv 2402.09353), written in the terms of the kinds that a mixed batch serves.

``y = g ⊙ (W + s B A) x + b`` with ``g = m / ‖W + s B A‖``, a norm for each output. That is a factor on the base's own
output, a low-rank update and a bias difference: ``y = g ⊙ (W x + b) + s (g ⊙ B) A x + (1 - g) ⊙ b``. The three are
exact; they need the base's weights, once, and cannot be trained further as DoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bertology_serve.deltas.bitfit import BitfitSpec
from bertology_serve.deltas.bitfit import slots as bias_slots
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.ia3 import Ia3Spec
from bertology_serve.deltas.kind import Tensors, chosen_layers
from bertology_serve.deltas.lora import LoraSpec
from bertology_serve.deltas.slots import Anatomy
from bertology_serve.errors import FormatError

LEAF = ".lora_magnitude_vector"
Magnitudes = Mapping[str, Tensor]


def spelt_out(lora: Delta, magnitudes: Magnitudes, weights: Mapping[str, Tensor], anatomy: Anatomy) -> Delta:
    """The LoRA delta of a DoRA checkpoint with its magnitudes [N] by module path, as three kinds.

    ``weights`` is the base's state dict. Raises FormatError where a magnitude is missing or belongs to no update.
    """
    spec: LoraSpec = lora.specs[0]
    left, tensors = dict(magnitudes), dict(lora.tensors)
    factors, biases = {}, _blank_biases(anatomy)
    for name in spec.targets:
        slot = anatomy.slot(name)
        factors[f"ia3.{name}"] = torch.ones(slot.depth, slot.outputs)
        tensors[f"lora.{name}.b"] = tensors[f"lora.{name}.b"].clone()
        for index, layer in enumerate(chosen_layers(spec.layers, slot.depth)):
            path, a = str(slot.paths[layer]), tensors[f"lora.{name}.a"][index]
            b = tensors[f"lora.{name}.b"][index]
            gain = _gain(path, left.pop(path, None), weights[f"{path}.weight"], spec.scale * b.double().T @ a.double())
            factors[f"ia3.{name}"][layer] = gain.float()
            tensors[f"lora.{name}.b"][index] = (b.double() * gain).float()
            bias = weights.get(f"{path}.bias")
            if bias is not None:
                biases[f"bitfit.{name}"][slot.present.index(layer)] = ((1.0 - gain) * bias.cpu().double()).float()
    if left:
        raise FormatError(f"the magnitudes of {next(iter(left))[:80]} belong to no update; save the checkpoint again")
    shifted = any(stack.any() for stack in biases.values())
    specs = (spec, Ia3Spec(spec.targets, ()), *([BitfitSpec()] if shifted else []))
    return replace(lora, specs=specs, tensors={**tensors, **factors, **(biases if shifted else {})})


def magnitudes(tensors: Tensors, anatomy: Anatomy, root: str) -> dict[str, Tensor]:
    """Takes peft's magnitude vectors out of ``tensors``, by module path in the headless encoder."""
    found = {}
    for name in [name for name in tensors if name.removesuffix(".weight").endswith(LEAF)]:
        path = name.removesuffix(".weight").removeprefix(root).removesuffix(LEAF)
        found[path.removeprefix(f"{anatomy.prefix}.")] = tensors.pop(name).float()
    return found


def _gain(path: str, magnitude: Tensor | None, weight: Tensor, change: Tensor) -> Tensor:
    """``m / ‖W + s B A‖`` [N], float64, for one module."""
    if magnitude is None or magnitude.numel() != len(weight):
        raise FormatError(f"the magnitudes of {path} are missing or of another width; save the checkpoint again")
    whole: Tensor = weight.cpu().double() + change
    gain: Tensor = magnitude.flatten().double() / torch.linalg.vector_norm(whole, dim=1)
    return gain


def _blank_biases(anatomy: Anatomy) -> Tensors:
    slots = bias_slots(BitfitSpec(), anatomy)
    return {f"bitfit.{slot.name}": torch.zeros(len(slot.present), slot.outputs) for slot in slots}
