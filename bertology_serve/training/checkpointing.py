"""Less memory for more time: the layers through which gradients flow keep only what enters them."""

from __future__ import annotations

from bertology_serve.encoder.live import Around, LiveDelta
from bertology_serve.training.layers import layer_paths, lowest_trained


def recomputed_layers(live: LiveDelta) -> tuple[str, ...]:
    """Paths of the layers that gradient checkpointing has run again: from the lowest trained one up."""
    return layer_paths(live.encoder.anatomy)[lowest_trained(live) :]


def checkpointing(live: LiveDelta) -> Around:
    """What a live delta's ``around`` is with gradient checkpointing."""
    paths = recomputed_layers(live)
    return lambda encodings, batch: live.encoder.recomputing(paths)
