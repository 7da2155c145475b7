"""Tiles of a batch and the deltas that own their rows, against what they must be."""

from __future__ import annotations

import numpy as np
import onnx_ir
import onnxruntime
import pytest

from bertology_serve.export.emitter.nodes import Nodes, Output
from bertology_serve.export.emitter.row_nodes import LARGEST, SMALLEST, Runs, tile


def cut(rows: int, runs: int) -> tuple[int, int]:
    nodes = Nodes(20)
    given = [nodes.input(name, (1,)) for name in ("rows", "runs")]
    outputs = [Output(name, one.real(), (1,)) for name, one in zip(("each", "tiles"), tile(*given), strict=True)]
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(nodes.model(given, *outputs)).SerializeToString())
    each, tiles = session.run(None, {"rows": np.array([rows]), "runs": np.array([runs])})
    return int(each[0]), int(tiles[0])


@pytest.mark.parametrize(("rows", "runs"), [(1, 1), (1500, 1), (7, 3), (17, 2), (33, 3), (768, 32), (1536, 8)])
def test_tiles_cover_the_rows_and_waste_less_than_one_tile(rows, runs):
    each, tiles = cut(rows, runs)
    assert 0 <= each * tiles - rows < each
    assert each == rows if runs == 1 else each <= LARGEST
    assert each >= min(SMALLEST // 2, rows // 2)


@pytest.mark.parametrize("each", [1, 3, 4, 12])
def test_every_row_finds_its_owner_and_no_other(each):
    index = np.array([2, 2, 2, 0, 0, 1, 2, 2, 2, 2, 2, 1])
    table = np.array([[10, 11, 12], [20, 21, 22], [30, 31, 32]])
    nodes = Nodes(20)
    given, known = nodes.input("index", ("rows",)), nodes.input("table", ("deltas", "columns"))
    runs = Runs(given, nodes.value([each]))
    numbers = runs.of(known)
    ranks, biases = runs.owned(known)
    tiled = runs.tiled(given.unsqueeze(1).real(), 1)
    outputs = [
        Output("numbers", numbers.real(), ("t", "n")),
        Output("ranks", ranks.real(), ("t", "c", "n")),
        Output("biases", biases, ("t", "c", "n")),
        Output("tiled", tiled, ("t", "c", 1)),
    ]
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(nodes.model([given, known], *outputs)).SerializeToString())
    numbers, ranks, biases, tiled = session.run(None, {"index": index, "table": table})
    assert np.array_equal(tiled, index.reshape(-1, each, 1))
    assert ranks.shape == biases.shape == (*tiled.shape[:2], numbers.shape[1])
    for chosen, columns in ((ranks, table[:, :-1]), (biases, table[:, -1:])):
        owned = (numbers[:, None] * chosen).reshape(len(index), -1)
        for row, delta in zip(owned, index, strict=True):
            assert sorted(row[row > 0]) == columns[delta].tolist()
