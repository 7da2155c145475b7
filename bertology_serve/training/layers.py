"""The encoder's layers by the paths of their modules: training the upper ones, their gradients, less memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bertology_serve.encoder.trainable import Around, TrainableDelta
from bertology_serve.errors import SpecError
from bertology_serve.kinds.slots import Anatomy


def lowest_trained(live: TrainableDelta) -> int:
    """The lowest layer whose output a live delta changes: the encoder's depth where only the head is trained."""
    anatomy = live.encoder.anatomy
    if not live.full:
        return live.effects().lowest(anatomy.layers)
    starts = [f"{path}." for path in anatomy.layer_paths]
    owners = [
        next((layer for layer, start in enumerate(starts) if name.startswith(start)), 0)
        for name, parameter in live.encoder.model.named_parameters()
        if parameter.requires_grad
    ]
    return min(owners)


def train_upper_layers(live: TrainableDelta, count: int) -> None:
    """Freezes all of the encoder but its upper ``count`` layers: no graph is then built below them.

    Raises SpecError where the encoder has fewer.
    """
    paths = live.encoder.anatomy.layer_paths
    if count > len(paths):
        raise SpecError(f"top-k is to train {count} layers, but {live.encoder.name} has {len(paths)}; lower --top-k")
    live.encoder.model.requires_grad_(False)
    for path in paths[len(paths) - count :]:
        live.encoder.model.get_submodule(path).requires_grad_(True)


def layer_norms(parameters: Mapping[str, torch.nn.Parameter], anatomy: Anatomy) -> dict[str, float]:
    """L2 norms of the gradients by place: ``embeddings``, ``0`` to ``L-1``, ``head``; ``delta`` for a delta's tensors.

    ``parameters`` are named as a live delta names them. What the encoder has beside layers and embeddings is ``rest``.
    """
    layers = {f"model.{path}.": str(number) for number, path in enumerate(anatomy.layer_paths)}
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


def recomputed_layers(live: TrainableDelta) -> tuple[str, ...]:
    """Paths of the layers that gradient checkpointing has run again: from the lowest trained one up."""
    return live.encoder.anatomy.layer_paths[lowest_trained(live) :]


def checkpointing(live: TrainableDelta) -> Around:
    """What a live delta's ``around`` is with gradient checkpointing."""
    paths = recomputed_layers(live)
    return lambda encodings, batch: live.encoder.recomputing(paths)
