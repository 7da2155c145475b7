"""The memory of a training run: what it will need, and the most that a piece of work held."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bertology_serve.encoder.trainable import TrainableDelta, recomputed_layers
from bertology_serve.tasks.base import Item
from bertology_serve.training.batches import micro_batches
from bertology_serve.training.trainer import Trainer

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Measures from its making to ``bytes()``: the GPU's allocations, or the resident memory of the whole process.

    ``bytes()`` is ``None`` where the system does not tell (Linux does).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known = device.type == "cuda" or self._reset()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        if not self.known:
            return None
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        found = [line.split()[1] for line in lines if line.startswith("VmHWM")]
        return int(found[0]) * 1024 if found else None

    @staticmethod
    def _reset() -> bool:
        """Lets the kernel forget the process's earlier peak."""
        try:
            _RESET.write_text("5", encoding="utf-8")
        except OSError:
            return False
        return True


@dataclass(frozen=True)
class Estimate:
    """Bytes that training needs: the encoder's and all trained weights, gradients, the optimizer's two moments, and
    what the largest micro-batch keeps for its backward pass."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate(trainer: Trainer) -> Estimate:
    """What a trainer that has not begun will need: counted, and for the activations tried on its longest items.

    Buffers of single operations, oneDNN's copies of frozen weights, and torch itself come on top.
    """
    live, config = trainer.live, trainer.config
    held = {parameter.data_ptr(): parameter for parameter in (*live.encoder.model.parameters(), *live.parameters())}
    trained = sum(parameter.nbytes for parameter in trainer.parameters.values())
    batch = trainer.processes.share(sorted(trainer.items, key=lambda item: item.tokens)[-config.optim.batch_size :])
    group = micro_batches(batch, config.machine.max_tokens, not live.encoder.packs)[-1]
    again = len(recomputed_layers(live)) if config.machine.checkpointing else 0
    activations = _activations(live, group, set(held), again)
    return Estimate(sum(parameter.nbytes for parameter in held.values()), trained, 2 * trained, activations)


def _activations(live: TrainableDelta, items: Sequence[Item], held: Collection[int], recomputed: int) -> int:
    """What is kept for a backward pass; of layers that are ``recomputed`` their inputs, and one of them as a whole."""
    kept, around = saved_bytes(live, items, held), live.around
    if not recomputed:
        return kept
    live.around = lambda encodings, batch: nullcontext()
    whole = saved_bytes(live, items, held)
    live.around = around
    return kept + (whole - kept) // recomputed


def saved_bytes(live: TrainableDelta, items: Sequence[Item], held: Collection[int] = ()) -> int:
    """Bytes that one forward pass in training mode keeps for its backward pass, those at ``held`` addresses apart."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    mode, state = live.training, torch.get_rng_state()
    live.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = live([encoding for item in items for encoding in item.encodings])  # alive until all is counted
    live.train(mode)
    torch.set_rng_state(state)
    del out
    return sum(storages.values())
