from __future__ import annotations

import pytest

from bertology_serve.errors import SpecError, Unsupported
from bertology_serve.export.emitter.emit import BackEnd, choose
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import ExportSpec
from tests import tiny
from tests.export.cases import DELTAS


@pytest.mark.parametrize(
    ("family", "options", "chosen"),
    [
        ("bert", {}, BackEnd(True, True, 20)),
        ("bert", {"target": "portable"}, BackEnd(True, False, 20)),
        ("bert", {"target": "portable", "unpad": True}, BackEnd(True, True, 20)),
        ("bert", {"unpad": False, "opset": 18}, BackEnd(True, False, 18)),
        ("bert", {"back_end": "torch"}, BackEnd(False, False, 20)),
        ("deberta-v3", {}, BackEnd(True, True, 20)),
        ("ernie", {}, BackEnd(False, False, 20)),
        ("ernie", {"opset": 21}, BackEnd(False, False, 21)),
    ],
)
def test_the_direct_back_end_where_it_can(family, options, chosen, tmp_path):
    encoder = tiny.encoder(family, tmp_path)
    parts = ExportInputs.of(encoder, tiny.delta(encoder, "x", *DELTAS["folds"]), True)
    assert choose(parts, ExportSpec(**options)) == chosen
    assert chosen.name == ("direct" if chosen.direct else "torch")


@pytest.mark.parametrize("options", [{"unpad": True}, {"back_end": "direct"}, {"precision": "int8-row"}])
def test_what_only_the_direct_back_end_does_is_refused_elsewhere(options, tmp_path):
    encoder = tiny.encoder("ernie", tmp_path)
    parts = ExportInputs.of(encoder, tiny.delta(encoder, "x", *DELTAS["folds"]), True)
    with pytest.raises(Unsupported, match=r"cannot write this model: ernie is not among .*; leave out --back-end"):
        choose(parts, ExportSpec(**options))


@pytest.mark.parametrize("options", [{"unpad": True}, {"precision": "int8-row"}])
def test_torch_does_neither(options):
    with pytest.raises(SpecError, match="torch's exporter neither unpads nor quantises"):
        ExportSpec(back_end="torch", **options)
