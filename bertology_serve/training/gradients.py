"""The length of each layer's gradient: where a first step falls hardest."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bertology_serve.deltas.slots import Anatomy
from bertology_serve.training.layers import layer_paths


def layer_norms(parameters: Mapping[str, torch.nn.Parameter], anatomy: Anatomy) -> dict[str, float]:
    """L2 norms of the gradients by place: ``embeddings``, ``0`` to ``L-1``, ``head``; ``delta`` for a delta's tensors.

    ``parameters`` are named as a live delta names them. What the encoder has beside layers and embeddings is ``rest``.
    """
    layers = {f"model.{path}.": str(number) for number, path in enumerate(layer_paths(anatomy))}
    squares: dict[str, float] = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            place = _place(name, layers)
            squares[place] = squares.get(place, 0.0) + float(torch.linalg.vector_norm(parameter.grad)) ** 2
    return {place: square**0.5 for place, square in squares.items()}


def _place(name: str, layers: Mapping[str, str]) -> str:
    if name.startswith("head."):
        return "head"
    if not name.startswith("model."):
        return "delta"
    found = [place for prefix, place in layers.items() if name.startswith(prefix)]
    return found[0] if found else "embeddings" if "embed" in name else "rest"
