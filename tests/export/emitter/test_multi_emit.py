"""One graph for deltas of every kind, in ONNX Runtime, against the torch engine."""

from __future__ import annotations

import numpy as np
import onnx_ir
import onnxruntime
import pytest

from bertology_serve.deltas.delta import bare
from bertology_serve.export.emitter import attention_nodes, row_nodes
from bertology_serve.export.emitter.emit import emit_hidden
from bertology_serve.export.export_inputs import ExportInputs
from tests import tiny
from tests.export.emitter.mixed import EVERY, FAMILIES, Both, mixed

LENGTHS = (5, 17, 2)
TABLES = ("ranks", "bias", "units", "activation", "rows", "form")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_alone_and_all_in_one_batch_equal_the_engine(family, tmp_path, monkeypatch):
    monkeypatch.setattr(row_nodes, "SPARED", (0, 2**40)[FAMILIES.index(family) % 2])  # in groups of like length, or one
    monkeypatch.setattr(attention_nodes, "LONG", (0, 2**40)[FAMILIES.index(family) // 2 % 2])  # in blocks of 4 rows
    monkeypatch.setattr(attention_nodes, "BLOCK", 4)
    both = mixed(family, tmp_path, list(EVERY), opset=(18, 20, 23)[FAMILIES.index(family) % 3])
    draw = np.random.default_rng(0)
    for name in both.entries:
        expected, found = both.rows([name] * 3, LENGTHS)
        assert np.abs(found - expected).max() <= 1e-5, name
    names = draw.permutation(["bare", *EVERY] * 3).tolist()
    expected, found = both.rows(names, draw.integers(1, 30, len(names)).tolist())
    assert np.abs(found - expected).max() <= 1e-5


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_graph_that_knows_its_kind_decides_nothing_and_gives_the_same_rows(family, tmp_path):
    both = mixed(family, tmp_path, list(EVERY))
    for names in (*([name, name] for name in both.entries), ["bare", "lora", "prompt"], ["folds", "prefix", "bare"]):
        known = both.feed.kind([both.entries[name] for name in names])
        expected, general = both.rows(names, (5, 17, 2)[: len(names)])
        model = emit_hidden(both.parts, 20, known=known)
        whole, both.session = both.session, onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
        asked = {one.name for one in both.session.get_inputs()} - {*both.parts.inputs, "delta"}
        assert {name for name in asked if ".".join(name.split(".")[-1:]) in TABLES} == known
        assert len(asked) < len(whole.get_inputs()) / 2
        _, found = both.rows(names, (5, 17, 2)[: len(names)])
        assert np.abs(found - general).max() <= 1e-6
        assert np.abs(found - expected).max() <= 1e-5
        decided = sum(node.op_type == "If" for node in model.graph)  # how sequences attend, adapters' activations
        layers = both.encoder.anatomy.layers
        assert decided <= layers * (2 + 3 * any("adapter" in name for name in known)) + 2, names
        both.session = whole


def test_new_deltas_join_without_a_new_graph(tmp_path):
    both = mixed("bert", tmp_path, ["lora"])
    before, _ = both.rows(["lora", "bare"], (7, 9))
    both.add("folds", "pfeiffer", "prompt", "prefix")
    expected, found = both.rows(["lora", "bare"], (7, 9))
    assert np.array_equal(before, expected)
    assert np.abs(found - expected).max() <= 1e-5
    expected, found = both.rows(["folds", "lora", "pfeiffer", "prompt", "prefix"], (7, 9, 4, 11, 2))
    assert np.abs(found - expected).max() <= 1e-5


def test_in_8_bits_a_row_does_not_see_its_neighbours(tmp_path):
    both = Both(tiny.encoder("bert", tmp_path), precision="int8-row")
    both.add("folds", "houlsby")
    expected, alone = both.rows(["folds"], (9,))
    _, together = both.rows(["folds", "folds", "houlsby"], (9, 20, 30))
    error = np.abs(alone - expected).max()
    assert 1e-4 < error <= 0.5
    assert (
        np.abs(together[: len(alone)] - alone).max() <= 0.5 * error
    )  # a value or two may tip to the next step, not all


def test_the_same_bytes_every_time(tmp_path):
    encoder = tiny.encoder("bert", tmp_path)
    parts = ExportInputs.of(encoder, bare("bare", encoder.ref, encoder.base_task), False)
    once, again = (onnx_ir.to_proto(emit_hidden(parts, 20)).SerializeToString() for _ in range(2))
    assert once == again
    assert str(tmp_path).encode() not in once
