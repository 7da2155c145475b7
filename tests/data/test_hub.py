"""Hub data sets, through a stand-in for the package ``datasets``: tests have no network."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from bertology_serve.data.records import read_records
from bertology_serve.data.set_files import parse_name
from bertology_serve.errors import DataError, Unsupported


class NoRoute(Exception):
    """As httpx has its own exceptions, which are no OSError."""


class Broken(list):
    features = {}  # noqa: RUF012

    def __iter__(self):
        yield {"text": "a"}
        raise KeyError("no decoder")


class Rows(list):
    features = {  # noqa: RUF012
        "sentence": SimpleNamespace(dtype="string"),
        "label": SimpleNamespace(names=["negative", "positive"]),
        "tags": SimpleNamespace(feature=SimpleNamespace(names=["O", "B-LOC"])),
    }


@pytest.fixture
def datasets(monkeypatch):
    """A module ``datasets`` that remembers how it was called."""
    module = ModuleType("datasets")
    module.calls = []

    def load_dataset(name, config, split):
        module.calls.append((name, config, split))
        if name == "missing":
            raise FileNotFoundError("no such\ndata set")
        if name == "offline":
            raise NoRoute
        if name == "broken":
            return Broken(["a"])
        return Rows([{"sentence": "a", "label": 1, "tags": [0, 1]}, {"sentence": "b", "label": -1, "tags": []}])

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_class_indices_become_names(datasets):
    records = read_records("hub:glue:sst2:validation", {"text": "sentence"})
    assert datasets.calls == [("glue", "sst2", "validation")]
    assert [tuple(record) for record in records] == [
        ({"label": "positive", "tags": ["O", "B-LOC"], "text": "a"}, "hub:glue:sst2:validation:1"),
        ({"label": None, "tags": [], "text": "b"}, "hub:glue:sst2:validation:2"),
    ]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hub:owner/name", ("owner/name", None, "train")),
        ("hub:name:test", ("name", None, "test")),
        ("hub:name:config", ("name", "config", "train")),
        ("hub:name:config:train[:10]", None),
        ("hub:name::dev", ("name", None, "dev")),
        ("hub:name:config:other", ("name", "config", "other")),
        ("hub:", None),
    ],
)
def test_names(name, parts):
    if parts is None:
        with pytest.raises(DataError, match="is no hub data set; expected hub:NAME"):
            parse_name(name)
    else:
        assert parse_name(name) == parts


def test_a_data_set_that_cannot_be_loaded_is_one_line(datasets):
    with pytest.raises(DataError, match=r"^hub:missing: the data set cannot be loaded \(no such data set\)$"):
        read_records("hub:missing")


def test_whatever_fails_is_one_line(datasets):
    with pytest.raises(DataError, match=r"^hub:offline: the data set cannot be loaded \(NoRoute\)$"):
        read_records("hub:offline")
    with pytest.raises(DataError, match=r"^hub:broken:2: the row cannot be read \('no decoder'\)$"):
        read_records("hub:broken")


def test_no_label_stays_no_label(datasets):
    datasets.load_dataset = lambda *_, **__: Rows([{"sentence": "a", "label": 0, "tags": [-100, 1, -100]}])
    assert read_records("hub:x")[0].fields["tags"] == [-100, "B-LOC", -100]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Unsupported, match=r"hub:x: hub data sets need .* pip install bertology-serve\[data\]"):
        read_records("hub:x")
