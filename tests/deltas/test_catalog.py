from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertology_serve.deltas import store
from bertology_serve.deltas.catalog import check_place, discover, find, identify, survey, versions
from bertology_serve.errors import FormatError, NotFound
from tests.deltas import samples


def save(directory: Path, name: str, seed: int = 0, age: int = 0) -> Path:
    delta = replace(samples.delta("bert", samples.SPECS["bitfit-attention"], seed=seed), name=name)
    store.save(delta, directory, samples.anatomy("bert"))
    os.utime(directory / "delta.json", ns=(10**18 - age, 10**18 - age))
    return directory


def paths(root: Path) -> dict[str, list[Path]]:
    return {name: [one.path for one in versions] for name, versions in discover(root).items()}


def test_versions_and_bare_directories_are_found(tmp_path: Path) -> None:
    for version in ("10", "9", "v1.2", "v1.10"):
        save(tmp_path / "intent" / version, "intent", age=int(version == "10"))
    old, new = save(tmp_path / "b", "mood", 1, age=5), save(tmp_path / "a", "mood", 2, age=9)
    found = paths(tmp_path)
    assert [path.name for path in found["intent"]] == ["9", "10", "v1.2", "v1.10"]
    assert found["mood"] == [new, old]  # the one written last comes last
    assert list(found) == ["intent", "mood"]


def test_named_versions_come_after_bare_ones(tmp_path: Path) -> None:
    bare, named = save(tmp_path / "x", "intent"), save(tmp_path / "intent" / "1", "intent", age=9)
    assert paths(tmp_path) == {"intent": [bare, named]}


def test_the_root_may_be_a_delta_or_the_directory_of_its_versions(tmp_path: Path) -> None:
    path = save(tmp_path / "intent" / "3", "intent")
    assert discover(path) == discover(tmp_path / "intent") == discover(tmp_path) == {"intent": [identify(path)]}
    assert identify(path) == ("intent", "3", path, False)


def test_hidden_and_other_directories_are_passed_over(tmp_path: Path) -> None:
    path = save(tmp_path / "x", "intent")
    save(tmp_path / ".x.123.tmp", "intent", 1)
    save(tmp_path / "intent" / ".9.123.tmp", "intent", 1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("")
    (tmp_path / "file").write_text("")
    assert paths(tmp_path) == {"intent": [path]}


def test_copies_of_one_version_are_one(tmp_path: Path) -> None:
    save(tmp_path / "a", "intent")
    save(tmp_path / "b", "intent")
    assert [path.name for path in paths(tmp_path)["intent"]] == ["b"]


def test_nothing_there(tmp_path: Path) -> None:
    assert discover(tmp_path) == {}
    with pytest.raises(NotFound, match="no directory"):
        discover(tmp_path / "x")


def test_a_directory_of_another_name_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "mood" / "1", "intent")
    (one,) = discover(tmp_path)["mood"]
    with pytest.raises(FormatError, match="holds delta 'intent', not 'mood'"):
        store.load(one.path, name=one.name)


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
    assert [path.name for path in paths(tmp_path)["intent"]] == ["3", "stable"]
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
    assert paths(tmp_path) == {"bare": [tmp_path / "bare"], "intent": [tmp_path / "intent" / "2"]}
    assert identify(tmp_path / "intent" / "2", name="intent").version == "2"
    assert len(identify(tmp_path / "bare").version) == 12


Expected = tuple[str, str | None] | None  # name and version of what was made, the version None where it is a hash


def own(path: Path, name: str) -> None:
    path.mkdir(parents=True)
    (path / "delta.json").write_text(json.dumps({"name": name, "at": str(path)}))


def peft(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({"at": str(path)}))
    (path / "adapter_model.safetensors").write_bytes(b"")


def linked(path: Path, away: Path) -> None:
    own(away / path.name, path.parent.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(away / path.name)


def broken(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "delta.json").write_text("{")


def trainer(path: Path) -> None:
    """What peft's Trainer leaves: the adapter, and its checkpoints below it."""
    peft(path)
    peft(path / "checkpoint-500")


# What may lie at root/X or root/X/V: how it is made, what it is called, and whether it is refused instead
BARE: dict[str, tuple[Callable[[Path, Path], object], Callable[[Path], Expected], bool]] = {
    "own": (lambda path, _: own(path, path.name), lambda path: (path.name, None), False),
    "own, renamed": (lambda path, _: own(path, f"was-{path.name}"), lambda path: (f"was-{path.name}", None), False),
    "peft": (lambda path, _: peft(path), lambda path: (path.name, None), False),
    "peft's trainer": (lambda path, _: trainer(path), lambda path: (path.name, None), False),
    "broken": (lambda path, _: broken(path), lambda path: None, True),
    "linked from outside": (linked, lambda path: None, True),
    "badly named": (lambda path, _: own(path, "A b"), lambda path: None, True),
    "empty": (lambda path, _: path.mkdir(parents=True), lambda path: None, False),
}
HELD: dict[str, tuple[Callable[[Path, Path], object], Callable[[Path], Expected], bool]] = {
    "own": (lambda path, _: own(path, path.parent.name), lambda path: (path.parent.name, path.name), False),
    "of another name": (lambda path, _: own(path, "other"), lambda path: (path.parent.name, path.name), False),
    "peft": (lambda path, _: peft(path), lambda path: (path.parent.name, path.name), False),
    "broken": (lambda path, _: broken(path), lambda path: (path.parent.name, path.name), False),
    "linked from outside": (linked, lambda path: None, True),
    "empty": (lambda path, _: path.mkdir(parents=True), lambda path: None, False),
}
VERSIONS = ("1", "2", "10", "checkpoint-500", ".9.123.tmp", "V 1")
ENTRY = st.tuples(st.sampled_from(sorted(BARE)), st.none()) | st.tuples(
    st.none(), st.dictionaries(st.sampled_from(VERSIONS), st.sampled_from(sorted(HELD)), min_size=1)
)
LAYOUT = st.dictionaries(st.sampled_from(["mood", "tone", "a.b", ".hidden", ".mood.1.tmp", "Upper"]), ENTRY, max_size=6)


@settings(max_examples=60, deadline=None)
@given(LAYOUT)
def test_whatever_lies_there_everybody_sees_the_same(layout) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, away = Path(folder) / "deltas", Path(folder) / "away"
        root.mkdir()
        expected: dict[Path, Expected] = {}
        refused: set[Path] = set()
        for name, (bare, held) in layout.items():
            made = [(root / name, *BARE[bare])] if bare else [(root / name / v, *HELD[how]) for v, how in held.items()]
            for path, make, called, bad in made:
                make(path, away / name)
                hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
                found = called(path)
                fits = not {"U", " "} & set("".join(filter(None, found or ())))
                if found and fits and not hidden:
                    expected[path] = found
                elif not hidden and (bad or not fits):
                    refused.add(path)
        deltas, bad = survey(root)
        assert {one.path for one in bad} == refused
        assert all(str(one.path) in one.reason and "\n" not in one.reason for one in bad)
        everything = [one for versions in deltas.values() for one in versions]
        assert {one.path for one in everything} == expected.keys()
        for one in everything:
            name, version = expected[one.path] or ("", "")
            assert (one.name, one.bare) == (name, version is None)
            assert version in (None, one.version)
            assert identify(one.path, name=one.name) == one
            assert versions(root, one.name)[one.version] == one
            if not bad:
                assert find(root, one.name, one.version) == one.path
        for name, known in deltas.items():
            assert list(versions(root, name)) == [one.version for one in known]
            numbers = [int(one.version) for one in known if one.version.isdigit() and not one.bare]
            assert numbers == sorted(numbers)


def test_one_that_cannot_be_identified_spoils_no_other(tmp_path: Path) -> None:
    good, own_fault = save(tmp_path / "intent" / "1", "intent"), tmp_path / "loose"
    broken(own_fault)
    deltas, refused = survey(tmp_path)
    assert [one.path for one in deltas["intent"]] == [good]
    assert [one.path for one in refused] == [own_fault]
    with pytest.raises(FormatError, match=r"loose/delta\.json is not valid JSON"):
        discover(tmp_path)


@pytest.mark.parametrize("what", ["directory", "dangling link", "pipe"])
def test_a_manifest_that_is_no_file_is_refused_and_not_passed_over(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    path.mkdir()
    if what == "directory":
        (path / "delta.json").mkdir()
    elif what == "pipe":
        os.mkfifo(path / "delta.json")
    else:
        (path / "delta.json").symlink_to(tmp_path / "gone")
    _, refused = survey(tmp_path)
    assert [one.path for one in refused] == [path]
    with pytest.raises(FormatError, match=r"delta\.json"):
        store.load(path)


def test_nothing_is_written_where_it_would_not_be_seen(tmp_path: Path) -> None:
    save(tmp_path / "bare", "bare")
    save(tmp_path / "intent" / "1", "intent")
    for path, name, message in (
        (tmp_path / "bare" / "2", "bare", "bare is a delta itself"),
        (tmp_path / "intent", "intent", "holds deltas, which one written there would hide"),
        (tmp_path / "intent" / "2", "mood", "holds versions of delta 'intent'"),
    ):
        with pytest.raises(FormatError, match=message):
            check_place(path, name)
        with pytest.raises(FormatError, match=message):
            save(path, name)
    broken(tmp_path / "intent" / "0")
    broken(tmp_path / "aaa")
    for path, name in ((tmp_path / "other", "mood"), (tmp_path / "intent" / "2", "intent"), (tmp_path / "bare", "x")):
        check_place(path, name)
    with pytest.raises(FormatError, match="holds versions of delta 'intent'"):
        check_place(tmp_path / "intent" / "2", "mood")
