from __future__ import annotations

import inspect
import subprocess

import pytest

from bertology_serve.bench.cpu import contenders, other_tools, our_tools
from bertology_serve.bench.cpu.contenders import CONTENDERS, ENVIRONMENTS, choose, make_environments, python_of, slug
from bertology_serve.bench.cpu.cpu_run import filled
from bertology_serve.bench.cpu.subject import SUITES, WORKLOADS
from bertology_serve.errors import SpecError

PLACES = dict.fromkeys(
    ("work", "base", "checkpoint", "deltas", "form", "pool", "here", "made", "family", "task", "width"), "1"
)


@pytest.mark.parametrize("one", CONTENDERS, ids=lambda one: f"{one.family}, {one.name}")
def test_every_contender_fits_its_functions(one):
    tools = our_tools if one.package else other_tools
    for function, options in (
        (getattr(tools, one.builder), one.options | {"threads": 1}),
        *((getattr(other_tools, maker), options) for maker, _, options in one.steps),
    ):
        inspect.signature(function).bind(**filled(options, PLACES))
    assert {one.environment, *(where for _, where, _ in one.steps)} <= {"", *ENVIRONMENTS}
    assert any(suite.family == one.family and suite.name in (one.only or (suite.name,)) for suite in SUITES)


def test_no_two_contenders_of_a_suite_have_a_name():
    for suite in SUITES:
        names = [one.name for one in choose("", WORKLOADS).takers(suite)]
        assert len(set(map(slug, names))) == len(names)
        assert {suite.baseline, suite.reference} <= set(names)


def test_words_choose_contenders_and_workloads():
    chosen = choose("CTranslate2; 8x128", WORKLOADS)
    assert [one.name for one in chosen.contenders] == ["CTranslate2", "CTranslate2, int8"]
    assert chosen.workloads == ["8x128"]
    assert choose("ctranslate2", WORKLOADS).workloads == WORKLOADS
    everybody = choose("", WORKLOADS).contenders
    assert not any(one.name == "torch.compile" for one in everybody)
    assert len(choose("", WORKLOADS, compiled=True).contenders) == len(everybody) + 1
    with pytest.raises(SpecError, match=r"^--only 'ctransformers' is in no name; workloads are 8x128; .*; fastembed; "):
        choose("ctransformers", WORKLOADS)


def test_what_is_chosen_knows_its_lines():
    chosen = choose("fastembed;1x16", WORKLOADS)
    assert chosen.has({"contender": "fastembed"})
    assert chosen.has({"contender": "fastembed", "workload": "1x16"})
    assert not chosen.has({"contender": "fastembed", "workload": "8x128"})
    assert not chosen.has({"contender": "CTranslate2", "workload": "1x16"})
    assert not chosen.has({"what": "header"})


def test_environments_are_made_once_and_what_fails_is_said(tmp_path, monkeypatch):
    ran, said = [], []

    def command(words, **_):
        ran.append(words)
        if "fastembed==0.9.1" in words and len(ran) < 5:
            raise subprocess.CalledProcessError(1, words, stderr="WARNING: x\nERROR: no fastembed\nERROR: more\n")
        if "install" in words:
            (tmp_path / words[0].removeprefix(f"{tmp_path}/").split("/")[0]).mkdir(exist_ok=True)

    monkeypatch.setattr(contenders.subprocess, "run", command)
    assert make_environments(tmp_path, said.append, ("openvino", "fastembed")) == {"fastembed": "ERROR: no fastembed"}
    assert ran[1][1:] == ["-m", "pip", "install", "--quiet", *ENVIRONMENTS["openvino"]]
    assert make_environments(tmp_path, said.append, ("openvino", "fastembed")) == {}
    assert [words[-1] for words in ran[4:]] == [str(tmp_path / "fastembed"), "fastembed==0.9.1"]
    assert said[2] == "openvino: there"


def test_what_takes_part_is_pinned():
    assert all("==" in one[0] for one in ENVIRONMENTS.values())


def test_an_environment_that_was_not_made_has_no_python(tmp_path):
    assert python_of({}, "openvino") is None
    assert python_of({"openvino": tmp_path}, "openvino") is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to("/nowhere/python")
    assert python_of({"openvino": tmp_path}, "openvino") is None
    (tmp_path / "bin" / "python").unlink()
    (tmp_path / "bin" / "python").write_text("")
    assert python_of({"openvino": tmp_path}, "openvino") == str(tmp_path / "bin" / "python")
