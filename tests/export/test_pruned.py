"""A pruned encoder's exports, by both back ends: the parent's deltas sliced, layers of different widths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import prune
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import export_delta
from bertology_serve.export.onnx_engine import OnnxEngine
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.lora import Lora
from tests import tiny
from tests.export.cases import ALL_LINEARS, CLASSES, EVERYTHING, FOLDS, small
from tests.export.test_torch_exporter import difference

HEADS, NEURONS = ((0, 2, 3), (1,)), ((1, 5), tuple(range(0, 48, 3)))


@pytest.fixture(params=["bert", "roberta", "distilbert"])
def pair(request, tmp_path: Path, monkeypatch) -> tuple[Encoder, Encoder]:
    """Whole and pruned."""
    whole = small(request.param, tmp_path / "whole", monkeypatch)
    prune(whole, HEADS, NEURONS, tmp_path / "pruned")
    return whole, Encoder.load(str(tmp_path / "pruned"))


@pytest.mark.parametrize("specs", [EVERYTHING, FOLDS], ids=["everything", "folds"])
def test_exports_equal_the_pruned_encoder(pair, specs, tmp_path: Path) -> None:
    whole, pruned = pair
    delta = tiny.delta(whole, "d", specs, CLASSES)
    spec = ExportSpec(merge=specs is EVERYTHING, bake=True, back_end="direct")
    done = export_delta(pruned, delta, tmp_path / "out", spec)
    assert done.report.largest < 1e-5
    assert done.report.scale > 0.1
    for merge in (True, False):
        assert difference(pruned, pruned.fitted(delta), merge) <= 1e-5  # what torch's exporter writes


def test_one_graph_for_many_deltas_of_a_pruned_encoder(pair) -> None:
    whole, pruned = pair
    made = Pipeline(pruned)
    for number, specs in enumerate(([Lora(ALL_LINEARS, rank=3)], EVERYTHING, [Bitfit()], [])):
        made.add(tiny.delta(whole, f"d{number}", specs, CLASSES, seed=number, size=0.2))
    texts = ("the cat was great", "a bad film", "dog")
    jobs = [made.prepare(Request(f"d{n}", {"text": text}, logits=True)) for n in range(4) for text in texts]
    expected = [answer.answer["logits"] for answer in made.run(jobs)]
    made.engine = OnnxEngine(pruned)
    found = [answer.answer["logits"] for answer in made.run(jobs)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-5)
