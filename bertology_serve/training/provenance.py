"""What a run is, for its continuation, and how a delta came to be, for its manifest and card."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

import bertology_serve
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.training.config import TrainConfig
from bertology_serve.training.methods import ParameterCount
from bertology_serve.training.sources import Data
from bertology_serve.training.state import RunState

# What may change between a run and its continuation, because no number depends on it.
FREE = ("save_every", "checkpointing")


def identity(config: TrainConfig, encoder: Encoder, name: str, data: Data, processes: int = 1) -> dict[str, Any]:
    """What a run and its continuation must have in common."""
    own = {key: value for key, value in config.as_dict().items() if key not in FREE}
    return own | {
        "name": name,
        "backbone": f"{encoder.name}, weights {encoder.ref.sha256[:12]}",
        "device": encoder.device.type if processes == 1 else f"{encoder.device.type}, {processes} processes",
        "train": data.train.fingerprint,
        "eval": data.dev.fingerprint if data.dev else None,
        "ood": data.ood.fingerprint if data.ood else None,
    }


def provenance(
    config: TrainConfig, counts: ParameterCount, state: RunState, data: Data, encoder: Encoder, processes: int = 1
) -> Mapping[str, Any]:
    """How the delta came to be."""
    device, several = encoder.device, f"{processes} processes, " if processes > 1 else ""
    return {
        "training": config.as_dict(),
        "train": data.train.facts(),
        "eval": data.dev.facts() if data.dev else None,
        **({"ood": data.ood.facts()} if data.ood else {}),
        "kept": f"step {state.best_step if config.keep == 'best' and data.dev else state.step} of {state.step}",
        "trained_parameters": counts.trained,
        "seconds": round(state.seconds, 1),
        "hardware": several + torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{several}CPU, {torch.get_num_threads()} threads",
        "versions": {
            "bertology-serve": bertology_serve.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(UTC).date().isoformat(),
    }
