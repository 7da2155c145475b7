"""The encoder's stack of layers by the paths of its modules, and training only the upper ones."""

from __future__ import annotations

from bertology_serve.deltas.slots import QUERY, Anatomy
from bertology_serve.encoder.live import LiveDelta
from bertology_serve.errors import SpecError


def layer_paths(anatomy: Anatomy) -> tuple[str, ...]:
    """Dotted paths of the layers, lowest first (``encoder.layer.0``, ...)."""
    paths = [(path or "").split(".") for path in anatomy.slot(QUERY).paths]
    last = paths[-1]
    at = next(i for i, part in enumerate(last) if part == str(len(paths) - 1) and all(p[:i] == last[:i] for p in paths))
    return tuple(".".join(path[: at + 1]) for path in paths)


def lowest_trained(live: LiveDelta) -> int:
    """The lowest layer whose output a live delta changes: the encoder's depth where only the head is trained."""
    anatomy = live.encoder.anatomy
    if not live.full:
        return live.effects().lowest(anatomy.layers)
    starts = [f"{path}." for path in layer_paths(anatomy)]
    owners = [
        next((layer for layer, start in enumerate(starts) if name.startswith(start)), 0)
        for name, parameter in live.encoder.model.named_parameters()
        if parameter.requires_grad
    ]
    return min(owners)


def train_upper_layers(live: LiveDelta, count: int) -> None:
    """Freezes all of the encoder but its upper ``count`` layers: no graph is then built below them.

    Raises SpecError where the encoder has fewer.
    """
    paths = layer_paths(live.encoder.anatomy)
    if count > len(paths):
        raise SpecError(f"top-k is to train {count} layers, but {live.encoder.name} has {len(paths)}; lower --top-k")
    live.encoder.model.requires_grad_(False)
    for path in paths[len(paths) - count :]:
        live.encoder.model.get_submodule(path).requires_grad_(True)
