from __future__ import annotations

import pytest

from bertology_serve.errors import SpecError
from bertology_serve.export.spec import ExportSpec


@pytest.mark.parametrize(("field", "value"), [("opset", 17), ("opset", 24), ("atol", 0.0), ("atol", float("nan"))])
def test_values_that_make_no_sense_are_refused(field, value):
    with pytest.raises(SpecError, match=rf"^{field} is {value}; expected "):
        ExportSpec(**{field: value})
