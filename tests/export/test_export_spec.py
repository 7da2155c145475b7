from __future__ import annotations

from typing import get_args

import pytest

from bertology_serve.errors import SpecError
from bertology_serve.export.export_spec import ExportSpec, Precision


@pytest.mark.parametrize(
    ("field", "value"), [("opset", 17), ("opset", 24), ("atol", 0.0), ("atol", float("nan")), ("max_drift", 0.0)]
)
def test_values_that_make_no_sense_are_refused(field, value):
    with pytest.raises(SpecError, match=rf"^{field} is {value}; expected "):
        ExportSpec(**{field: value})


@pytest.mark.parametrize(
    ("options", "opset"),
    [
        ({}, 20),
        ({"precision": "int8-row"}, 20),
        ({"precision": "int8-row", "opset": 23}, 23),
        ({"opset": 18}, 18),
        ({"target": "portable"}, 20),
        ({"target": "cuda"}, 20),
    ],
)
def test_the_operator_set(options, opset):
    assert ExportSpec(**options).operators == opset


def test_drift_is_for_quantised_files():
    assert ExportSpec(max_drift=0.2).drift(6) == 0
    assert ExportSpec(max_drift=0.2, precision="int8-row").drift(6) == 0.2


def test_drift_grows_with_the_root_of_the_layers():
    """Six layers of 8 bits may be off by a tenth, twelve by half as much again; blocks of 32 by half of that."""
    found = {name: [round(ExportSpec(precision=name).drift(n), 3) for n in (6, 12)] for name in get_args(Precision)}
    assert found == {
        "fp32": [0.0, 0.0],
        "fp16": [0.01, 0.014],
        "int8-row": [0.098, 0.139],
        "int8-nbits": [0.049, 0.069],
        "int8-dynamic": [0.196, 0.277],
    }


def test_neighbours_may_change_what_the_precision_says():
    allowed = {name: ExportSpec(precision=name).neighbours for name in get_args(Precision)}
    assert allowed.pop("fp32") == "nothing"
    assert allowed.pop("int8-dynamic") == "anything"
    assert set(allowed) == {"fp16", "int8-row", "int8-nbits"}
    assert set(allowed.values()) == {"rounding"}


@pytest.mark.parametrize("precision", ["int8-row", "int8-dynamic"])
def test_kernels_of_cpus_are_not_for_cuda(precision):
    with pytest.raises(SpecError, match=rf"^precision {precision} is for CPUs; for the target cuda take fp16"):
        ExportSpec(precision=precision, target="cuda")
    assert ExportSpec(precision="fp16", target="cuda").provider == "CUDAExecutionProvider"
    assert not ExportSpec(precision="fp16", target="cuda").unpads
