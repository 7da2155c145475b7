from __future__ import annotations

from typing import Any

import pytest

from bertology_serve.deltas.typed import build
from bertology_serve.errors import FormatError
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.slots import Slot
from bertology_serve.tasks.spec import TaskSpec


def test_lists_become_tuples_and_whole_numbers_floats() -> None:
    spec = build(Lora, {"targets": ["query"], "alpha": 16, "layers": [0, 2]}, "kinds.lora")
    assert spec == Lora(("query",), alpha=16.0, layers=(0, 2))
    assert isinstance(spec.alpha, float)


def test_null_stands_where_it_is_allowed() -> None:
    assert build(Adapter, {"activation": None}, "kinds.adapter") == Adapter()
    assert build(Lora, {"layers": None}, "kinds.lora").layers is None


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (Lora, {"rnak": 8}, "unknown field 'rnak'; did you mean 'rank'"),
        (Lora, {"rank": "8"}, "x.rank is '8'; expected a whole number"),
        (Lora, {"rank": 8.5}, "x.rank is 8.5; expected a whole number"),
        (Lora, {"rank": True}, "x.rank is True; expected a whole number"),
        (Lora, {"rank": 2**60}, "expected a whole number"),
        (Lora, {"alpha": 10**400}, "expected a number"),
        (Lora, {"alpha": float("nan")}, "expected a number"),
        (Lora, {"rank": None}, "x.rank is None"),
        (Lora, {"rank": -1}, "rank is -1"),
        (Lora, {"targets": "query"}, "x.targets is 'query'; expected a list"),
        (Lora, {"targets": ["query", 3]}, r"x.targets\[1\] is 3; expected a string"),
        (Lora, {"rslora": 1}, "x.rslora is 1; expected true or false"),
        (Lora, [], r"x is \[\]; expected an object"),
        (TaskSpec, {}, "lacks the field 'kind'"),
        (TaskSpec, {"kind": "chess"}, "unknown task 'chess'"),
        (Slot, {"name": "q", "paths": [], "inputs": 1, "outputs": 1, "has_bias": True, "part": [1]}, "has 1 entries"),
    ],
)
def test_what_does_not_fit_is_named(cls: type[Any], values: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        build(cls, values, "x")
