from __future__ import annotations

from typing import get_args

import pytest

from bertology_serve.errors import SpecError
from bertology_serve.export.spec import ExportSpec, Precision


@pytest.mark.parametrize(
    ("field", "value"), [("opset", 17), ("opset", 24), ("atol", 0.0), ("atol", float("nan")), ("max_drift", 0.0)]
)
def test_values_that_make_no_sense_are_refused(field, value):
    with pytest.raises(SpecError, match=rf"^{field} is {value}; expected "):
        ExportSpec(**{field: value})


@pytest.mark.parametrize(
    ("options", "opset"),
    [
        ({}, 23),
        ({"precision": "int8-row"}, 20),
        ({"precision": "int8-row", "opset": 23}, 23),
        ({"opset": 18}, 18),
        ({"target": "portable"}, 20),
        ({"target": "cuda"}, 20),
    ],
)
def test_the_operator_set_that_is_fastest_or_portable(options, opset):
    assert ExportSpec(**options).operators == opset


def test_drift_is_for_quantised_files():
    assert ExportSpec(max_drift=0.2).drift == 0
    assert ExportSpec(max_drift=0.2, precision="int8-row").drift == 0.2
    assert ExportSpec(precision="fp16").drift == 0.01


def test_neighbours_may_change_what_the_precision_says():
    allowed = {name: ExportSpec(precision=name).neighbours for name in get_args(Precision)}
    assert allowed.pop("fp16") == "rounding"
    assert allowed.pop("int8-dynamic") == "anything"
    assert set(allowed) == {"fp32", "int8-row", "int8-nbits"}
    assert set(allowed.values()) == {"nothing"}


@pytest.mark.parametrize("precision", ["int8-row", "int8-dynamic"])
def test_kernels_of_cpus_are_not_for_cuda(precision):
    with pytest.raises(SpecError, match=rf"^precision {precision} is for CPUs; for the target cuda take fp16"):
        ExportSpec(precision=precision, target="cuda")
    assert ExportSpec(precision="fp16", target="cuda").provider == "CUDAExecutionProvider"
    assert not ExportSpec(precision="fp16", target="cuda").unpads
