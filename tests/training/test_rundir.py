from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bertology_serve.deltas import store
from bertology_serve.deltas.catalog import identify, survey
from bertology_serve.errors import FormatError, InputError, SpecError
from bertology_serve.training.run_directory import Destination, RunDirectory
from tests.deltas import samples

IDENTITY = {"epochs": 2, "method": ["lora"], "train": "4 rows"}


def test_continues_the_same_run_and_remembers_the_machine(tmp_path):
    RunDirectory(tmp_path / "d").open(IDENTITY, {"prepacked": True}, resume=False)
    again = RunDirectory(tmp_path / "d")
    again.check_free(resume=True, overwrite=False)
    assert again.open(IDENTITY, {"prepacked": False}, resume=True) == {"prepacked": True}
    assert again.load() is None


def test_another_run_is_named_by_its_field(tmp_path):
    RunDirectory(tmp_path / "d").open(IDENTITY, {}, resume=False)
    with pytest.raises(InputError, match="epochs was 2 and is now 3"):
        RunDirectory(tmp_path / "d").open({**IDENTITY, "epochs": 3}, {}, resume=True)


def test_what_is_in_the_way_is_said(tmp_path):
    directory = RunDirectory(tmp_path / "d")
    directory.open(IDENTITY, {}, resume=False)
    with pytest.raises(InputError, match="continue it with --resume, or discard it with --overwrite"):
        directory.check_free(resume=False, overwrite=False)
    directory.check_free(resume=False, overwrite=True)
    (tmp_path / "d").mkdir()
    directory.check_free(resume=True, overwrite=False)
    (tmp_path / "d" / "delta.json").write_text("{}")
    with pytest.raises(InputError, match="exists; choose another --out, or replace it with --overwrite"):
        directory.check_free(resume=True, overwrite=False)
    directory.check_free(resume=True, overwrite=True)


def test_what_is_no_delta_is_never_replaced(tmp_path):
    """``--out`` one level too high, where all versions of a delta lie, or a home directory."""
    (tmp_path / "d" / "1").mkdir(parents=True)
    with pytest.raises(InputError, match="is no delta's directory; choose another --out"):
        RunDirectory(tmp_path / "d").check_free(resume=False, overwrite=True)


def test_a_new_run_forgets_the_old_one(tmp_path):
    directory = RunDirectory(tmp_path / "d")
    directory.open(IDENTITY, {}, resume=False)
    directory.save({"a": torch.ones(1)}, {"step": 1})
    directory.open(IDENTITY, {}, resume=False)
    assert directory.load() is None


def test_resume_without_a_run_begins_one(tmp_path):
    directory = RunDirectory(tmp_path / "deep" / "d")
    assert directory.open(IDENTITY, {"prepacked": False}, resume=True) == {"prepacked": False}
    directory.remove()
    assert not directory.path.exists()


def test_checkpoint_of_another_stage_is_not_this_one_s(tmp_path):
    directory = RunDirectory(tmp_path / "d")
    directory.open(IDENTITY, {}, resume=False)
    for stage, step in ((1, 1), (1, 2), (2, 1)):
        directory.log({"stage": stage, "step": step})
    directory.save({"a": torch.ones(1)}, {"stage": 1, "step": 2})
    assert directory.load(2) is None
    lines = (directory.path / "log.jsonl").read_text().splitlines()
    assert lines == ['{"stage": 1, "step": 1}', '{"stage": 1, "step": 2}']
    assert directory.load(1)[1] == {"stage": 1, "step": 2}


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    directory = RunDirectory(tmp_path / "d")
    directory.open(IDENTITY, {}, resume=False)
    for step in range(1, 6):
        directory.log({"step": step})
    directory.save({"a": torch.ones(1)}, {"step": 3})
    with (directory.path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert directory.load()[1] == {"step": 3}
    lines = (directory.path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize("text", ["", "[]", '{"identity": 3, "machine": {}}'])
def test_a_broken_description_is_one_line(tmp_path, text):
    directory = RunDirectory(tmp_path / "d")
    directory.open(IDENTITY, {}, resume=False)
    (directory.path / "run.json").write_text(text)
    with pytest.raises(FormatError, match="does not describe a run"):
        directory.open(IDENTITY, {}, resume=True)


@pytest.mark.parametrize(
    ("out", "name", "version", "expected"),
    [
        ("My Set", None, None, ("my-set", "My Set")),
        ("x", "sst2", None, ("sst2", "x")),
        ("sst2", None, "3", ("sst2", "sst2/3")),
    ],
)
def test_destination_names_the_delta(tmp_path, out, name, version, expected):
    found, directory = Destination(tmp_path / out, name, version).open()
    assert (found, directory.out) == (expected[0], tmp_path / expected[1])
    assert directory.path.parent == directory.out.parent


@pytest.mark.parametrize(
    ("out", "name", "version", "error"),
    [
        ("base", None, None, FormatError),
        ("x", "../x", None, FormatError),
        ("x", None, "a/b", FormatError),
        ("x", "y", "1", SpecError),
    ],
)
def test_destination_refuses_names(tmp_path, out, name, version, error):
    with pytest.raises(error):
        Destination(tmp_path / out, name, version).open()


@pytest.mark.parametrize(
    ("out", "name", "version", "expected"),
    [
        ("mood", None, None, ("mood", None)),
        ("mood", "tone", None, ("tone", None)),
        ("mood", None, "2", ("mood", "2")),
        ("mood/2", "mood", None, ("mood", "2")),
        ("Mood 1", None, None, ("mood-1", None)),
    ],
)
def test_a_delta_is_found_under_the_name_that_it_was_trained_for(tmp_path, out, name, version, expected):
    called, directory = Destination(tmp_path / out, name, version).open()
    delta = replace(samples.delta("bert", samples.SPECS["lora"]), name=called)
    store.save(delta, directory.out, samples.anatomy("bert"))
    ((one,),) = survey(tmp_path)[0].values()
    assert (one.name, None if one.bare else one.version) == expected
    assert (one.name, one.path) == (called, directory.out)
    assert identify(directory.out).version == one.version == store.load(one.path, name=one.name).version
