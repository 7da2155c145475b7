from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from bertology_serve.deltas import store
from bertology_serve.deltas.catalog import discover, find, identify
from bertology_serve.errors import FormatError, NotFound
from tests.deltas import samples


def save(directory: Path, name: str, seed: int = 0, age: int = 0) -> Path:
    delta = replace(samples.delta("bert", samples.SPECS["bitfit-attention"], seed=seed), name=name)
    store.save(delta, directory, samples.anatomy("bert"))
    os.utime(directory / "delta.json", ns=(10**18 - age, 10**18 - age))
    return directory


def test_versions_and_bare_directories_are_found(tmp_path: Path) -> None:
    for version in ("10", "9", "v1.2", "v1.10"):
        save(tmp_path / "intent" / version, "intent", age=int(version == "10"))
    old, new = save(tmp_path / "b", "mood", 1, age=5), save(tmp_path / "a", "mood", 2, age=9)
    found = discover(tmp_path)
    assert [path.name for path in found["intent"]] == ["9", "10", "v1.2", "v1.10"]
    assert found["mood"] == [new, old]  # the one written last comes last
    assert list(found) == ["intent", "mood"]


def test_named_versions_come_after_bare_ones(tmp_path: Path) -> None:
    bare, named = save(tmp_path / "x", "intent"), save(tmp_path / "intent" / "1", "intent", age=9)
    assert discover(tmp_path) == {"intent": [bare, named]}


def test_the_root_may_be_a_delta_or_the_directory_of_its_versions(tmp_path: Path) -> None:
    path = save(tmp_path / "intent" / "3", "intent")
    assert discover(path) == discover(tmp_path / "intent") == discover(tmp_path) == {"intent": [path]}
    assert identify(path) == ("intent", "3", False)


def test_hidden_and_other_directories_are_passed_over(tmp_path: Path) -> None:
    path = save(tmp_path / "x", "intent")
    save(tmp_path / ".x.123.tmp", "intent", 1)
    save(tmp_path / "intent" / ".9.123.tmp", "intent", 1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("")
    (tmp_path / "file").write_text("")
    assert discover(tmp_path) == {"intent": [path]}


def test_copies_of_one_version_are_one(tmp_path: Path) -> None:
    save(tmp_path / "a", "intent")
    save(tmp_path / "b", "intent")
    assert [path.name for path in discover(tmp_path)["intent"]] == ["b"]


def test_nothing_there(tmp_path: Path) -> None:
    assert discover(tmp_path) == {}
    with pytest.raises(NotFound, match="no directory"):
        discover(tmp_path / "x")


def test_a_directory_of_another_name_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "mood" / "1", "intent")
    with pytest.raises(FormatError, match="holds delta 'intent', not 'mood'"):
        discover(tmp_path)


def test_versions_have_plain_names(tmp_path: Path) -> None:
    save(tmp_path / "intent" / "V 1", "intent")
    with pytest.raises(FormatError, match="version 'V 1' cannot be used"):
        discover(tmp_path)


def test_links_may_not_leave_the_root(tmp_path: Path) -> None:
    path = save(tmp_path / "out", "intent")
    root = tmp_path / "root"
    (root / "intent").mkdir(parents=True)
    (root / "intent" / "1").symlink_to(path)
    with pytest.raises(FormatError, match="points outside"):
        discover(root)


def test_a_link_to_a_version_is_a_version(tmp_path: Path) -> None:
    save(tmp_path / "intent" / "3", "intent")
    (tmp_path / "intent" / "stable").symlink_to("3")
    assert [path.name for path in discover(tmp_path)["intent"]] == ["3", "stable"]
    assert store.load(tmp_path / "intent" / "stable").version == "stable"


def test_find(tmp_path: Path) -> None:
    save(tmp_path / "intent" / "1", "intent")
    newest = save(tmp_path / "intent" / "2", "intent")
    assert find(tmp_path, "intent") == newest
    assert find(tmp_path, "intent", "1").name == "1"
    for name, version, message in (
        ("intnet", None, "did you mean 'intent'"),
        ("../x", None, "no delta"),
        ("intent", "3", "no version '3'"),
        ("intent", "../1", "no version"),
    ):
        with pytest.raises(NotFound, match=message):
            find(tmp_path, name, version)


def test_pefts_directories_are_called_as_they_lie(tmp_path: Path) -> None:
    for path in (tmp_path / "bare", tmp_path / "intent" / "2"):
        save(path, "intent")
        (path / "delta.json").unlink()
    # without delta.json and with peft's configuration it is a directory of peft's
    for path in (tmp_path / "bare", tmp_path / "intent" / "2"):
        assert (path / "adapter_config.json").exists()
    assert discover(tmp_path) == {"bare": [tmp_path / "bare"], "intent": [tmp_path / "intent" / "2"]}
    assert identify(tmp_path / "intent" / "2", name="intent").version == "2"
    assert len(identify(tmp_path / "bare").version) == 12
