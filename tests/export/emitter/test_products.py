"""Products in 8 bits against float64, and the promises that they make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch

from bertology_serve.encoder.bank import BARE, DeltaBank
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.export.emitter.nodes import Nodes, Output
from bertology_serve.export.emitter.products import (
    BLOCK,
    blocked_product,
    blocks,
    dynamic_product,
    product,
    quantised,
    quantised_product,
)
from bertology_serve.export.export_inputs import ExportInputs, column_scales
from bertology_serve.export.export_spec import ON_CPU
from bertology_serve.export.onnx_engine import OnnxEngine
from bertology_serve.export.samples import Reference
from bertology_serve.kinds.slots import BEHIND_NORMS
from tests import tiny
from tests.export.cases import DELTAS, encodings, padded
from tests.export.emitter.test_emit import Run, difference

SIZES = [(1, 1, 1), (5, 33, 17), (64, 384, 96)]
BOUNDS = [("int8-row", 0.05, 0.01), ("int8-nbits", 0.05, 0.01), ("fp16", 0.005, 0.005), ("int8-dynamic", 0.1, 0.1)]
"""Precision; largest relative error; largest change of a row by its neighbours: in 8 bits, what follows from one value
that float32's last bit tips over to the next step."""


def rows_and_weight(rows: int, inputs: int, outputs: int) -> tuple[np.ndarray, torch.Tensor]:
    """Whole numbers, for they are the input; rows and columns of very different sizes."""
    generator = np.random.default_rng(rows)
    x = np.round(generator.normal(size=(rows, inputs)) * 10.0 ** generator.integers(1, 6, (rows, 1)))
    return x.astype(np.int64), torch.from_numpy(
        (generator.normal(size=(outputs, inputs)) * 10.0 ** generator.integers(-3, 2, (outputs, 1))).astype(np.float32)
    )


def run(multiply, x: np.ndarray, weight: torch.Tensor) -> np.ndarray:
    nodes = Nodes(18)
    given = nodes.input("x")
    model = nodes.model([given], Output("y", multiply(given.real(), "w", weight), ("rows", "columns")))
    return onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString()).run(None, {"x": x})[0]


def naive(x: np.ndarray, weight: torch.Tensor) -> np.ndarray:
    """Every number rounded to a 127th of the largest in its row or column, multiplied in float64."""

    def rounded(values: np.ndarray) -> np.ndarray:
        scales = np.abs(values).max(1, keepdims=True) / 127
        return np.round(values / scales) * scales

    return rounded(x.astype(np.float64)) @ rounded(weight.double().numpy()).T


@pytest.mark.parametrize("size", SIZES)
def test_both_precisions_against_float64(size):
    x, weight = rows_and_weight(*size)
    exact = x.astype(np.float64) @ weight.double().numpy().T
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weight, axis=1)
    assert (np.abs(run(product, x, weight) - exact) / norms).max() < 1e-6
    assert (np.abs(run(quantised_product, x, weight) - exact) / norms).max() < 0.02
    # a value halfway between two integers may be rounded either way: one step of the row or the column
    assert (np.abs(run(quantised_product, x, weight) - naive(x, weight)) / norms).max() < 0.002


def test_a_row_of_zeros_stays_zero():
    x, weight = rows_and_weight(4, 16, 8)
    x[1] = 0
    weight[2] = 0
    out = run(quantised_product, x, weight)
    assert not out[1].any()
    assert not out[:, 2].any()
    assert out[0, 0] != 0


def test_a_row_never_sees_its_neighbours():
    x, weight = rows_and_weight(64, 384, 96)
    together = run(quantised_product, x, weight)
    assert all(np.array_equal(run(quantised_product, x[i : i + 1], weight)[0], together[i]) for i in range(0, 64, 7))


@pytest.mark.parametrize("size", SIZES)
def test_blocks_against_float64(size):
    """Each block of a row is rounded to a 127th of its largest, so the error is below a row's."""
    x, weight = rows_and_weight(*size)
    exact = x.astype(np.float64) @ weight.double().numpy().T
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weight, axis=1)
    assert (np.abs(run(blocked_product, x, weight) - exact) / norms).max() < 0.02
    alone = run(blocked_product, x[-1:], weight)[0]
    assert np.allclose(alone, run(blocked_product, x, weight)[-1], rtol=1e-5, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("inputs", [1, 32, 33, 96])
def test_blocks_hold_the_weight(inputs):
    weight = torch.randn(5, inputs, generator=torch.Generator().manual_seed(inputs))
    integers, scales = blocks(weight)
    assert integers.shape == (5, -(-inputs // BLOCK), BLOCK)
    back = ((integers.double() - 128) * scales[..., None]).reshape(5, -1)
    assert (back[:, :inputs] - weight).abs().max() <= scales.max() / 2 * 1.0001
    assert not back[:, inputs:].any()


def test_one_scale_for_all_rows_lets_a_row_see_its_neighbours():
    x, weight = rows_and_weight(64, 384, 96)
    exact = x.astype(np.float64) @ weight.double().numpy().T
    together = run(dynamic_product, x, weight)
    norms = np.abs(x).max() * np.sqrt(x.shape[1]) * np.linalg.norm(weight, axis=1)
    assert (np.abs(together - exact) / norms).max() < 0.02
    assert not np.array_equal(run(dynamic_product, x[:1], weight)[0], together[0])


def test_weights_use_the_whole_range():
    integers, scales = quantised(torch.tensor([[0.5, -2.0], [0.0, 0.0], [3.0, 1.5]]))
    assert integers.tolist() == [[32, -127], [0, 0], [127, 64]]
    assert scales[[0, 2]].tolist() == pytest.approx([2 / 127, 3 / 127])


@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet"])
@pytest.mark.parametrize("name", ["folds", "everything"])
def test_an_encoder_below_float32_stays_close_and_its_rows_apart(family, name, tmp_path):
    encoder = tiny.encoder(family, tmp_path)
    delta = tiny.delta(encoder, "x", *DELTAS[name])
    expected = Reference(encoder, delta)
    sequences = encodings((20, 3, 9), typed=family == "bert")
    exact = np.stack([row.numpy() for row in expected.outputs(sequences)])
    for unpad in (False, True):
        for precision, most, change in BOUNDS:
            parts = ExportInputs.of(encoder, delta, name == "folds", precision)
            run = Run(parts, unpad=unpad, precision=precision)
            out = run(*padded(sequences, left=True))
            assert 1e-5 < np.linalg.norm(out - exact) / np.linalg.norm(exact) < most, precision
            alone = np.concatenate([run(*padded([one], left=False)) for one in sequences])
            assert np.abs(alone - out).max() <= change, precision


def with_outliers(directory: Path) -> Encoder:
    """Two columns of every LayerNorm are sixty times the others; the weights that read them are as much smaller."""
    encoder = tiny.encoder("modernbert", directory)
    for slot in encoder.anatomy.slots.values():
        for path in filter(None, slot.paths):
            weight = encoder.model.get_submodule(path).weight.data
            if not slot.inputs:
                weight[:2] *= 60
            elif any(slot.name in group for group in BEHIND_NORMS):
                weight[:, :2] /= 60
    return encoder


@pytest.mark.parametrize("precision", ON_CPU)
def test_column_scales_bring_outliers_into_8_bits(precision, tmp_path):
    encoder = with_outliers(tmp_path)
    delta = tiny.delta(encoder, "x", *DELTAS["folds"])
    sequences = encodings((20, 3, 9), typed=False)
    exact = np.stack([row.numpy() for row in Reference(encoder, delta).outputs(sequences)])
    made = ExportInputs.of(encoder, delta, True, precision)
    scaled, plain = (Run(one, unpad=True, precision=precision) for one in (made, replace(made, columns={})))
    out = scaled(*padded(sequences, left=True))
    off, before = (np.linalg.norm(one - exact) for one in (out, plain(*padded(sequences, left=True))))
    assert off < before / 3  # a fortieth, measured
    if precision == "int8-row":
        alone = np.concatenate([scaled(*padded([one], left=False)) for one in sequences])
        assert np.abs(alone - out).max() <= 0.01 * np.abs(exact).max()
    assert difference(Run(made, unpad=True), Reference(encoder, delta)) <= 1e-5, "float32 has no use for them"


def test_so_they_do_on_the_engine_for_many(tmp_path, monkeypatch):
    encoder = with_outliers(tmp_path)
    bank = DeltaBank(encoder.anatomy, encoder.dtype, encoder.device)
    delta = tiny.delta(encoder, "x", *DELTAS["everything"])
    batch = encoder.pack(
        encodings((20, 3, 9), typed=False), [bank.add("x", delta.effects(encoder.anatomy)), BARE, BARE]
    )
    with torch.inference_mode():
        exact = encoder.run(batch, bank)
    off = (OnnxEngine(encoder, "int8-row").run(batch, bank) - exact).norm()
    monkeypatch.setattr("bertology_serve.export.onnx_engine.column_scales", lambda encoder, state: {})
    assert off < (OnnxEngine(encoder, "int8-row").run(batch, bank) - exact).norm() / 3


def test_linears_of_the_same_rows_share_their_column_scales(tmp_path):
    encoder = tiny.encoder("bert", tmp_path)
    scales = column_scales(encoder, encoder.model.state_dict())
    slots = encoder.anatomy.slots
    assert scales.keys() == {
        path for group in BEHIND_NORMS for name in group if name in slots for path in slots[name].paths
    }
    query, key = (scales[str(slots[name].paths[1])] for name in ("query", "key"))
    assert torch.equal(query, key)
    assert not any(module._forward_pre_hooks for module in encoder.model.modules())
