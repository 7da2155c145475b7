from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bertology_serve.deltas.catalog import check_name
from bertology_serve.deltas.format import FileRecord, Manifest, anatomy_of, anatomy_record, from_json, to_json
from bertology_serve.deltas.layout import shapes_of
from bertology_serve.errors import FormatError
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.deltas import samples


def manifest(metrics: dict[str, float] | None = None, provenance: dict[str, Any] | None = None) -> Manifest:
    delta = samples.delta("bert", samples.SPECS["all"])
    return Manifest(
        delta.name, delta.base, delta.task, delta.specs, samples.anatomy("bert"), shapes_of(delta.tensors),
        shapes_of(delta.head), {"adapter_model.safetensors": FileRecord(9, "0" * 64)}, metrics or {}, provenance or {},
    )  # fmt: skip


def values() -> dict[str, Any]:
    return copy.deepcopy(json.loads(to_json(manifest())))


def test_everything_comes_back() -> None:
    whole = manifest({"accuracy": 0.5}, {"seed": 3, "data": ["ä.jsonl", [1.5, 2e-5]]})
    assert from_json(json.loads(to_json(whole)), "delta.json") == whole


def test_a_task_that_does_not_say_whether_it_is_of_pairs_takes_both() -> None:
    older = values()
    del older["task"]["pairs"]
    assert from_json(older, "delta.json").task.pairs is False


def test_fields_that_earlier_versions_do_not_know_stand_only_where_they_say_something() -> None:
    assert not {"thresholds", "abstain", "long", "aggregate"} & values()["task"].keys()
    careful = replace(manifest(), task=TaskSpec("multi-label", ("a", "b"), thresholds=(0.25, 0.5)))
    written = json.loads(to_json(careful))
    assert written["task"]["thresholds"] == [0.25, 0.5]
    assert "abstain" not in written["task"]
    assert from_json(written, "delta.json") == careful
    long = replace(manifest(), task=TaskSpec("regression", long="windows"))
    written = json.loads(to_json(long))
    assert written["task"]["long"] == "windows"
    assert from_json(written, "delta.json") == long


def test_numbers_stand_on_one_line_and_nothing_else_changes() -> None:
    trap = "[\n 1,\n 2\n]"
    text = to_json(manifest(provenance={"text": trap, "numbers": [1, -2.5e-7]})).decode()
    assert '"numbers": [1, -2.5e-07]' in text
    assert json.loads(text)["provenance"]["text"] == trap


def test_a_metric_without_value_is_null_and_comes_back_as_nan() -> None:
    data = to_json(manifest({"pearson": math.nan}))
    assert json.loads(data)["metrics"] == {"pearson": None}
    assert math.isnan(from_json(json.loads(data), "delta.json").metrics["pearson"])


@pytest.mark.parametrize("value", [math.inf, {1, 2}, b"bytes"])
def test_what_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(FormatError, match="cannot hold the provenance"):
        to_json(manifest(provenance={"value": value}))


def replaced(path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(table: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for parent in parents:
            table = table[parent]
        table[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("format", 2), "has format 2; expected 1"),
        (replaced("format", "1"), "has format 1; expected 1"),
        (replaced("nmae", "x"), "unknown field 'nmae'; did you mean 'name'"),
        (lambda table: table.pop("task"), "lacks the field 'task'"),
        (replaced("name", "../x"), "name '../x' cannot be used"),
        (replaced("name", 3), "name '3' cannot be used"),
        (replaced("base/sha", "x"), "did you mean 'sha256'"),
        (replaced("base", None), "base is None; expected an object"),
        (replaced("task/labels", "yes"), "task.labels is 'yes'; expected a list"),
        (replaced("task/labels", ["a", "a"]), "labels repeat"),
        (replaced("task/max_length", -3), "max_length is -3"),
        (replaced("kinds", {"lroa": {}}), "did you mean 'lora'"),
        (replaced("kinds/lora/rank", 0), "rank is 0"),
        (replaced("kinds/lora/init", "ones"), "unknown init 'ones'"),
        (replaced("tensors", {"a": [1, -1]}), "expected a shape"),
        (replaced("tensors", {"a": [1.5]}), "expected a shape"),
        (replaced("head", {"a": 3}), "expected a shape"),
        (replaced("files", {}), "files lacks 'adapter_model.safetensors'"),
        (lambda table: table["files"].update({"../x": {}}), "unknown field '../x'"),
        (replaced("files/other.safetensors", {}), "unknown field 'other.safetensors'"),
        (replaced("files/adapter_model.safetensors/sha256", "zz"), "expected 64 hexadecimal digits"),
        (replaced("files/adapter_model.safetensors/bytes", "9"), "expected a whole number"),
        (replaced("metrics", {"f1": "high"}), "metrics.f1 is 'high'; expected a number"),
        (replaced("metrics", {"f1": 10**400}), "expected a number"),
        (replaced("provenance", []), "expected an object"),
        (replaced("anatomy/slots", None), "expected an object"),
    ],
)
def test_malformed_fields_are_named(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    table = values()
    change(table)
    with pytest.raises(FormatError, match=message) as caught:
        from_json(table, "delta.json")
    assert str(caught.value).startswith("delta.json")


@pytest.mark.parametrize("name", ["a", "sst2-lora", "1", "v1.2_3", "a" * 64])
def test_plain_names_pass(name: str) -> None:
    assert check_name(name, "delta name") == name


BAD = ["", ".", "..", ".hidden", "-flag", "A", "a/b", "../a", "a\\b", "a b", "a\n", "é", "a" * 65, "base", "a\0", 3]


@pytest.mark.parametrize("name", BAD)
def test_path_tricks_and_reserved_names_are_refused_in_one_line(name: object) -> None:
    with pytest.raises(FormatError, match="delta name") as caught:
        check_name(name, "delta name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_comes_back_from_json(family: str) -> None:
    anatomy = samples.anatomy(family)
    assert anatomy_of(json.loads(json.dumps(anatomy_record(anatomy))), anatomy.family, "anatomy") == anatomy


def test_regular_paths_are_one_template_and_gaps_a_list() -> None:
    slots = anatomy_record(samples.anatomy("modernbert"))["slots"]
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
        anatomy_of(anatomy_record(samples.anatomy("bert")) | change, "bert", "anatomy")


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
    values = anatomy_record(samples.anatomy("bert"))
    values["slots"]["query"] |= change
    with pytest.raises(FormatError, match=message):
        anatomy_of(values, "bert", "anatomy")
