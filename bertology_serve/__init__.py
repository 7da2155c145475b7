"""One frozen BERT-like encoder, many small deltas of every kind, one packed batch.

The names in ``__all__`` are the public API. They are imported from their modules on first use, so that
``import bertology_serve`` costs no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bertology_serve import analysis
    from bertology_serve.api import evaluate, load_delta, train
    from bertology_serve.deltas.delta import BaseRef, Delta
    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.encoder.pipeline import Pipeline, Prediction, Request
    from bertology_serve.errors import BertologyError
    from bertology_serve.export.exporting import export
    from bertology_serve.kinds.adapter import Adapter
    from bertology_serve.kinds.bitfit import Bitfit
    from bertology_serve.kinds.ia3 import Ia3
    from bertology_serve.kinds.lora import Lora
    from bertology_serve.kinds.norms import Norms
    from bertology_serve.kinds.prefix import Prefix
    from bertology_serve.kinds.prompt import Prompt
    from bertology_serve.kinds.vera import Vera
    from bertology_serve.serving.config import ServerConfig
    from bertology_serve.serving.serve import serve
    from bertology_serve.tasks.redaction import Redactor, restore
    from bertology_serve.tasks.spec import TaskSpec
    from bertology_serve.training.method_options import ChildTuning, Full, Mixout, Probe, TopK

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "BaseRef",
    "BertologyError",
    "Bitfit",
    "ChildTuning",
    "Delta",
    "Encoder",
    "Full",
    "Ia3",
    "Lora",
    "Mixout",
    "Norms",
    "Pipeline",
    "Prediction",
    "Prefix",
    "Probe",
    "Prompt",
    "Redactor",
    "Request",
    "ServerConfig",
    "TaskSpec",
    "TopK",
    "Vera",
    "__version__",
    "analysis",
    "evaluate",
    "export",
    "load_delta",
    "restore",
    "serve",
    "train",
]

_HOMES = {
    "Adapter": "kinds.adapter",
    "BaseRef": "deltas.delta",
    "BertologyError": "errors",
    "Bitfit": "kinds.bitfit",
    "Delta": "deltas.delta",
    "Encoder": "encoder.encoder",
    "Lora": "kinds.lora",
    "Norms": "kinds.norms",
    "Ia3": "kinds.ia3",
    "Pipeline": "encoder.pipeline",
    "Prediction": "encoder.pipeline",
    "Prefix": "kinds.prefix",
    "Prompt": "kinds.prompt",
    "Request": "encoder.pipeline",
    "ServerConfig": "serving.config",
    "TaskSpec": "tasks.spec",
    "Vera": "kinds.vera",
    "serve": "serving.serve",
    **dict.fromkeys(("Redactor", "restore"), "tasks.redaction"),
    **dict.fromkeys(("ChildTuning", "Full", "Mixout", "Probe", "TopK"), "training.method_options"),
    **dict.fromkeys(("evaluate", "load_delta", "train"), "api"),
}


def __getattr__(name: str) -> Any:
    if name in ("analysis", "export"):  # packages; export is callable
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
