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
        ({"target": "openvino"}, 20),
    ],
)
def test_the_operator_set(options, opset):
    assert ExportSpec(**options).operators == opset


def of_precision(name: Precision) -> ExportSpec:
    return ExportSpec(precision=name, target="openvino" if name == "int8-static" else "cpu")


def test_drift_is_for_quantised_files():
    assert ExportSpec(max_drift=0.2).drift(6) == 0
    assert ExportSpec(max_drift=0.2, precision="int8-row").drift(6) == 0.2


def test_drift_grows_with_the_root_of_the_layers():
    """Six layers of 8 bits may be off by a tenth, twelve by half as much again; blocks of 32 by half of that."""
    specs = {name: of_precision(name) for name in get_args(Precision)}
    found = {name: [round(spec.drift(n), 3) for n in (6, 12)] for name, spec in specs.items()}
    assert found == {
        "fp32": [0.0, 0.0],
        "fp16": [0.01, 0.014],
        "int8-row": [0.098, 0.139],
        "int8-nbits": [0.049, 0.069],
        "int8-dynamic": [0.196, 0.277],
        "int8-static": [0.196, 0.277],
    }


def test_neighbours_may_change_what_the_precision_says():
    allowed = {name: of_precision(name).neighbours for name in get_args(Precision)}
    assert allowed.pop("fp32") == "nothing"
    assert allowed.pop("int8-dynamic") == "anything"
    assert set(allowed) == {"fp16", "int8-row", "int8-nbits", "int8-static"}
    assert set(allowed.values()) == {"rounding"}


@pytest.mark.parametrize("precision", ["int8-row", "int8-dynamic"])
def test_kernels_of_cpus_are_not_for_cuda(precision):
    with pytest.raises(SpecError, match=rf"^precision {precision} is for CPUs; for the target cuda take fp16"):
        ExportSpec(precision=precision, target="cuda")
    assert ExportSpec(precision="fp16", target="cuda").provider == "CUDAExecutionProvider"
    assert not ExportSpec(precision="fp16", target="cuda").unpads


@pytest.mark.parametrize("target", ["cpu", "cuda", "portable"])
def test_scales_taken_beforehand_are_openvinos(target):
    with pytest.raises(SpecError, match=rf"^precision int8-static is not for the target {target}; "):
        ExportSpec(precision="int8-static", target=target)


@pytest.mark.parametrize("precision", ["fp16", "int8-row", "int8-nbits", "int8-dynamic"])
def test_openvino_takes_its_own_precisions(precision):
    with pytest.raises(SpecError, match=r"openvino takes fp32 and int8-static"):
        ExportSpec(precision=precision, target="openvino")


@pytest.mark.parametrize("options", [{"unpad": True}, {"layout": "triton"}])
def test_openvinos_files_are_padded_and_lie_at_the_root(options):
    assert ExportSpec(target="openvino").model == ExportSpec(target="openvino", layout="flat").model
    with pytest.raises(SpecError, match="leave out --unpad and --layout"):
        ExportSpec(target="openvino", **options)
