"""Torch's exporter on the families that ``test_exporting`` does not take through it: every kind in one graph."""

from __future__ import annotations

import onnx_ir
import onnxruntime
import pytest

from bertology_serve.export.export_inputs import parts_of
from bertology_serve.export.samples import Reference
from bertology_serve.export.torch_exporter import Graph, to_onnx
from tests import tiny
from tests.export.cases import CLASSES, EVERYTHING, TAGS
from tests.export.emitter.test_emit import Run, difference
from tests.export.test_exporting import TASKS as ELSEWHERE

REST = {"roberta": CLASSES, "electra": TAGS, "deberta-v3": CLASSES, "deberta-own": TAGS}


class Traced(Run):
    """A graph from torch's exporter."""

    def __init__(self, parts) -> None:
        self.parts = parts
        self.session = onnxruntime.InferenceSession(onnx_ir.to_proto(to_onnx(Graph(parts), 20)).SerializeToString())


def test_no_family_is_left_out():
    assert {*REST, *ELSEWHERE} == set(tiny.FAMILIES)


@pytest.mark.parametrize("family", REST)
def test_every_kind_at_once_equals_the_engine(family, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny._SIZE, "num_hidden_layers", 1)
    encoder = tiny.encoder(family, tmp_path)
    delta = tiny.delta(encoder, "x", EVERYTHING, REST[family])
    assert difference(Traced(parts_of(encoder, delta, merge=True)), Reference(encoder, delta)) <= 1e-5
