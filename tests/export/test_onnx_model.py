from __future__ import annotations

import logging
import warnings

import pytest
import torch

from bertology_serve.errors import Unsupported
from bertology_serve.export import torch_exporter
from bertology_serve.export.torch_exporter import to_onnx


class Untraceable(torch.nn.Module):
    inputs, outputs, names = ("input_ids", "attention_mask"), ("logits",), {}
    model = torch.nn.Identity()

    def forward(self, input_ids, attention_mask):
        return input_ids * (2.0 if input_ids.sum().item() > 3 else 1.0)


def test_a_model_that_torch_cannot_trace_is_refused_by_name():
    with pytest.raises(Unsupported, match="torch cannot turn Identity into ONNX: "):
        to_onnx(Untraceable().eval(), 20)


def test_the_exporter_is_silenced_narrowly():
    logger = logging.getLogger("onnxscript.optimizer._constant_folding")
    before = logger.level
    with torch_exporter._quiet():
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use something else", FutureWarning, stacklevel=1)
        assert logger.level == logging.ERROR
        with pytest.raises(FutureWarning, match="something new"):
            warnings.warn("something new", FutureWarning, stacklevel=1)
    assert logger.level == before
