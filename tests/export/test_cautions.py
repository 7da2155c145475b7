from __future__ import annotations

import re
from dataclasses import replace

import pytest

from bertology_serve.export.export_spec import CPU, CUDA, ExportSpec
from bertology_serve.export.verify import Verification, cautions

REPORT = Verification("onnxruntime 1", CPU, 1e-5, 1e-7, 1e-8, 1.0, 0.25, 2.5, 3, (), asked=CPU)


@pytest.mark.parametrize(
    ("spec", "changes", "said"),
    [
        ({}, {}, []),
        ({}, {"lost": {"float16": 0.01, "bfloat16": 0.08}}, []),
        ({}, {"lost": {"float16": 0.01, "bfloat16": 0.4}}, ["a cast of these .* to bfloat16 40%; "]),
        (
            {"precision": "fp16"},
            {"lost": {"float16": 0.2, "bfloat16": 0.7}},
            ["float16 loses 20% of the delta; leave out --merge", "a cast of these .* to bfloat16 70%; "],
        ),
        ({"precision": "int8-dynamic"}, {"flips": 0.016}, ["up to 0.25 and 1.6% of decisions; --precision int8-row"]),
        ({"precision": "int8-dynamic"}, {}, ["up to 0.25; --precision int8-row does not let them"]),
        ({"target": "cuda"}, {"asked": CUDA}, [f"{CUDA} was asked for, but {CPU} ran; bertology-serve doctor"]),
    ],
)  # fmt: skip
def test_what_is_worth_saying(spec, changes, said):
    found = cautions(ExportSpec(**spec), replace(REPORT, **changes))
    assert len(found) == len(said)
    for sentence, expected in zip(found, said, strict=True):
        assert re.search(expected, sentence)
