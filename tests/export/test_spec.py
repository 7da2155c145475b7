from __future__ import annotations

import pytest

from bertology_serve.errors import SpecError
from bertology_serve.export.spec import ExportSpec


@pytest.mark.parametrize(
    ("field", "value"), [("opset", 17), ("opset", 24), ("atol", 0.0), ("atol", float("nan")), ("max_drift", 0.0)]
)
def test_values_that_make_no_sense_are_refused(field, value):
    with pytest.raises(SpecError, match=rf"^{field} is {value}; expected "):
        ExportSpec(**{field: value})


def test_drift_is_for_quantised_files():
    assert ExportSpec(max_drift=0.2).drift == 0
    assert ExportSpec(max_drift=0.2, precision="int8-row").drift == 0.2
