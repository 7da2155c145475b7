"""A merged delta as the checkpoint that other tools export: HuggingFace's task model with the weights folded in."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.linear import Prepacked
from bertology_serve.errors import Unsupported
from bertology_serve.export import hf_model
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.layout import architectures


def task_model(export_inputs: ExportInputs, delta: Delta) -> Any:
    """HuggingFace's own model for the task, float32, on CPU, not training, its attention SDPA.

    ``export_inputs`` are those of the merged delta. Raises Unsupported where something of it does not fold, or where
    HuggingFace has no model for the task.
    """
    names = architectures(delta)
    if not names or delta.effects(export_inputs.anatomy).unfoldable:
        raise Unsupported(f"delta {delta.name!r} is no checkpoint that others could export; give one that folds")
    return hf_model.task_model(export_inputs, names[0], "sdpa")


class _Packed(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.product = Prepacked(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


def prepacked(model: Any) -> Any:
    """A copy of a model with its linears laid out for oneDNN."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, _Packed(child))
    return model
