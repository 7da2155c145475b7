"""One frozen BERT-like encoder, many small deltas of every kind, one packed batch.

The names in ``__all__`` are the public API. They are imported from their modules on first use, so that
``import bertology_serve`` costs no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bertology_serve.api import evaluate, load_delta, train
    from bertology_serve.deltas.bitfit import BitfitSpec
    from bertology_serve.deltas.bottleneck import AdapterSpec
    from bertology_serve.deltas.delta import BaseRef, Delta
    from bertology_serve.deltas.lora import LoraSpec
    from bertology_serve.deltas.prefix import PrefixSpec
    from bertology_serve.deltas.prompt import PromptSpec
    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.encoder.pipeline import Pipeline, Prediction, Request
    from bertology_serve.errors import BertologyError
    from bertology_serve.export.exporting import export
    from bertology_serve.tasks.spec import TaskSpec

__version__ = "0.1.0"

__all__ = [
    "AdapterSpec",
    "BaseRef",
    "BertologyError",
    "BitfitSpec",
    "Delta",
    "Encoder",
    "LoraSpec",
    "Pipeline",
    "Prediction",
    "PrefixSpec",
    "PromptSpec",
    "Request",
    "TaskSpec",
    "__version__",
    "evaluate",
    "export",
    "load_delta",
    "train",
]

_HOMES = {
    "AdapterSpec": "deltas.bottleneck",
    "BaseRef": "deltas.delta",
    "BertologyError": "errors",
    "BitfitSpec": "deltas.bitfit",
    "Delta": "deltas.delta",
    "Encoder": "encoder.encoder",
    "LoraSpec": "deltas.lora",
    "Pipeline": "encoder.pipeline",
    "Prediction": "encoder.pipeline",
    "PrefixSpec": "deltas.prefix",
    "PromptSpec": "deltas.prompt",
    "Request": "encoder.pipeline",
    "TaskSpec": "tasks.spec",
    **dict.fromkeys(("evaluate", "load_delta", "train"), "api"),
}


def __getattr__(name: str) -> Any:
    if name == "export":  # the package, which is callable
        return importlib.import_module(f"{__name__}.export")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
