"""One file that a run continues from: tensors and a JSON state, whole or not at all; and where the run stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bertology_serve.errors import FormatError
from bertology_serve.files import JsonObject, replacing


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, object]) -> None:
    """Replaces the file ``path``: a kill at any moment leaves the old one or the new."""
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with replacing(path) as own:
        save_file(copies, own, metadata={"state": json.dumps(state)})


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """The tensors and the state; raises FormatError where the file is not a whole checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return tensors, json.loads(file.metadata()["state"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        line = " ".join(str(error).split())
        raise FormatError(f"{path} is no checkpoint of a run: {line}; begin again with --overwrite") from None


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's random generators as tensors [bytes]."""
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(device: torch.device, states: Mapping[str, Tensor]) -> None:
    """The inverse of ``random_state``."""
    torch.set_rng_state(states["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in states:
        torch.cuda.set_rng_state(states["rng.cuda"], device)


@dataclass
class RunState:
    """``stage`` counts a recipe's stages from 1, and is 0 where there is but one. ``epoch`` and ``offset`` are the
    sampler's place; ``best`` is the highest dev metric and, where several steps reached it, the highest negative loss
    among them; ``best_step`` got there.

    ``metrics`` are those of the state that is kept, ``stale`` counts evaluations since ``best_step``, ``stopped`` says
    that patience ran out, ``seconds`` is the time spent so far.
    """

    stage: int = 0
    step: int = 0
    epoch: int = 0
    offset: int = 0
    best: list[float] = field(default_factory=list)
    best_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    stopped: bool = False
    seconds: float = 0.0

    def as_dict(self) -> JsonObject:
        """Ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: JsonObject) -> RunState:
        """The inverse of ``as_dict``."""
        return cls(**values)
