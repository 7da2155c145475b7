from __future__ import annotations

import pytest

from bertology_serve.errors import SpecError, Unsupported
from bertology_serve.export.back_ends import Chosen, choose
from bertology_serve.export.export_inputs import parts_of
from bertology_serve.export.export_spec import ExportSpec
from tests import tiny
from tests.export.cases import DELTAS


@pytest.mark.parametrize(
    ("family", "options", "chosen"),
    [
        ("bert", {}, Chosen(True, True, 23)),
        ("bert", {"target": "portable"}, Chosen(True, False, 20)),
        ("bert", {"target": "portable", "unpad": True}, Chosen(True, True, 20)),
        ("bert", {"unpad": False, "opset": 18}, Chosen(True, False, 18)),
        ("bert", {"back_end": "torch"}, Chosen(False, False, 20)),
        ("deberta-v3", {}, Chosen(False, False, 20)),
        ("deberta-v3", {"opset": 21}, Chosen(False, False, 21)),
    ],
)
def test_the_direct_back_end_where_it_can(family, options, chosen, tmp_path):
    encoder = tiny.encoder(family, tmp_path)
    parts = parts_of(encoder, tiny.delta(encoder, "x", *DELTAS["folds"]), True)
    assert choose(parts, ExportSpec(**options)) == chosen
    assert chosen.name == ("direct" if chosen.direct else "torch")


@pytest.mark.parametrize("options", [{"unpad": True}, {"back_end": "direct"}, {"precision": "int8-row"}])
def test_what_only_the_direct_back_end_does_is_refused_elsewhere(options, tmp_path):
    encoder = tiny.encoder("deberta-v3", tmp_path)
    parts = parts_of(encoder, tiny.delta(encoder, "x", *DELTAS["folds"]), True)
    with pytest.raises(Unsupported, match=r"cannot write this model: deberta-v2 is not among .*; leave out --back-end"):
        choose(parts, ExportSpec(**options))


@pytest.mark.parametrize("options", [{"unpad": True}, {"precision": "int8-row"}])
def test_torch_does_neither(options):
    with pytest.raises(SpecError, match="torch's exporter neither unpads nor quantises"):
        ExportSpec(back_end="torch", **options)
