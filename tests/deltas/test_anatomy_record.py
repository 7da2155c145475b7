from __future__ import annotations

import json
from typing import Any

import pytest

from bertology_serve.deltas.anatomy_record import record, restore
from bertology_serve.errors import FormatError
from tests import tiny
from tests.deltas import samples


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_comes_back_from_json(family: str) -> None:
    anatomy = samples.anatomy(family)
    assert restore(json.loads(json.dumps(record(anatomy))), anatomy.family, "anatomy") == anatomy


def test_regular_paths_are_one_template_and_gaps_a_list() -> None:
    slots = record(samples.anatomy("modernbert"))["slots"]
    assert slots["query"]["paths"] == "layers.{}.attn.Wqkv"
    assert slots["attention_norm"]["paths"][0] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 10**9}, "describes no encoder"),
        ({"layers": 0}, "describes no encoder"),
        ({"hidden": 33}, "describes no encoder"),
        ({"heads": 0}, "describes no encoder"),
        ({"hiden": 32}, "did you mean 'hidden'"),
        ({"family": "bert"}, "unknown field 'family'"),
        ({"slots": []}, "expected an object"),
        ({"slots": {f"s{i}": {} for i in range(65)}}, "65 slots"),
    ],
)
def test_no_encoder_is_like_this(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        restore(record(samples.anatomy("bert")) | change, "bert", "anatomy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": ["a", "b"]}, "one a layer"),
        ({"paths": "../{}"}, "dotted module names"),
        ({"paths": 3}, "expected a list"),
        ({"part": [0, 5]}, "no such slot"),
        ({"outputs": 0}, "no such slot"),
        ({"inputs": -1}, "no such slot"),
    ],
)
def test_no_slot_is_like_this(change: dict[str, Any], message: str) -> None:
    values = record(samples.anatomy("bert"))
    values["slots"]["query"] |= change
    with pytest.raises(FormatError, match=message):
        restore(values, "bert", "anatomy")
