"""The whole benchmark on a small encoder with our own contenders, and what it must refuse, resume and leave out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from bertology_serve.bench.cpu import contenders, cpu_run, subject, worker_process
from bertology_serve.bench.cpu.contenders import ALONE, ENGINE, LORA8, NO_DELTA, UNPADDED, UNPADDED_ROW, choose
from bertology_serve.bench.cpu.cpu_log import ANSWERS, EXPORT, HEADER, MISSING, OPENED, SUITE, TIME, Log
from bertology_serve.bench.cpu.cpu_run import Plan, filled, joules, processor, run
from bertology_serve.bench.cpu.subject import WORKLOADS, Inputs, bare
from bertology_serve.errors import SpecError, Unsupported
from bertology_serve.tasks.registry import task_for
from tests import tiny
from tests.bench.cpu.conftest import AGAIN
from tests.bench.cpu.in_process import InProcess
from tests.export.cases import CLASSES, DELTAS, FOLDS, TAGS


def plan(only: str, **more) -> Plan:
    return Plan(choose(only, WORKLOADS), rounds=1, **more)


@pytest.fixture
def measured(encoder, delta, tmp_path, monkeypatch):
    """Runs with some words of ``--only``; what was said is kept in ``said``. Files are written once in a test."""

    def prepare(*values):
        suites = frozenset(values[-1])
        if suites not in written:
            written[suites] = subject.prepare(*values)
        return written[suites]

    written: dict[frozenset[str], subject.Subject] = {}
    monkeypatch.setattr(cpu_run, "prepare", prepare)

    def measure(only: str, inputs: Inputs | None = None, **more) -> Log:
        said.clear()
        return run(
            encoder, delta, inputs or Inputs(), plan(only, **more), tmp_path / "work", tmp_path / "out", said.append
        )

    said: list[str] = []
    measure.said = said
    return measure


def labelled():
    task = task_for(CLASSES)
    records = [{"text": "the good cat " * (1 + i % 3), "label": CLASSES.labels[i % 3]} for i in range(9)]
    examples = [task.example(record, f"here:{i}", True) for i, record in enumerate(records)]
    return Inputs((), task, examples)


@pytest.mark.usefixtures("small")
def test_one_model(measured):
    log = measured("ours, unpadded;torch engine;1x16;64 mixed", labelled())
    by_name = {line["contender"]: line for line in log.of(ANSWERS)}
    lowered = f"{ENGINE}, bf16"  # on processors that are faster by it
    assert set(by_name) - {lowered} == {UNPADDED, AGAIN, UNPADDED_ROW, ENGINE}
    for name, answers in by_name.items():
        exact = name not in (UNPADDED_ROW, lowered)
        assert answers["relative"] <= (1e-5 if exact else 0.05), name
        assert answers["cosine"] == pytest.approx(1.0, abs=1e-6 if exact else 1e-2), name
        assert answers["worst"] <= answers["cosine"] + 1e-6
        assert answers["neighbours"] <= (2e-2 if name == lowered else 1e-5), name
        assert set(answers["metrics"]) >= {"accuracy"}
        assert answers["agreement"] >= (1.0 if exact else 0.8)
    assert (
        len(
            {json.dumps(answers["metrics"]) for name, answers in by_name.items() if name not in (UNPADDED_ROW, lowered)}
        )
        == 1
    )
    for workload, tokens in (("1x16", 16), ("64 mixed", None)):
        times = log.of(TIME, workload=workload)
        assert {line["contender"] for line in times} == set(by_name)
        assert all(line["cpu"] >= 0 and line["rss"] > 1e6 for line in times)
        assert tokens is None or log.last(SUITE)["workloads"][workload]["tokens"] == tokens
    assert not log.of(TIME, workload="8x128")
    assert {line["same"] for line in log.of(EXPORT)} == {True}
    assert log.last(HEADER)["processor"] == log.path.parent.name
    assert [line for line in log.of(OPENED, contender=UNPADDED) if line["bytes"] > 0]
    assert [line for line in log.of(MISSING) if line["contender"] != lowered] == []


@pytest.mark.usefixtures("small")
def test_what_the_log_has_is_not_measured_again(measured):
    first = measured("ours, unpadded, again;1x16").lines
    InProcess.asked.clear()
    again = measured("ours, unpadded, again;1x16")
    assert InProcess.asked == []
    assert len(again.of(TIME)) == len([line for line in first if line["what"] == TIME]) == 2
    more = measured("unpadded, int8-row;1x16")
    assert sorted(line["contender"] for line in more.of(TIME, turn=1)) == [UNPADDED, UNPADDED_ROW]
    assert more.ratio(ALONE, "1x16", UNPADDED_ROW, AGAIN) is not None
    forgotten = measured("unpadded, int8-row;1x16", again=True)
    assert len(forgotten.of(TIME, contender=UNPADDED_ROW)) == 1
    assert len(forgotten.of(TIME, contender=AGAIN)) == 1
    with pytest.raises(SpecError, match=r"is of other weights or threads; give another --output, or --again$"):
        measured("again;1x16", threads=2)
    assert {line["threads"] for line in measured("again;1x16", threads=2, again=True).of(HEADER)} == {2}


@pytest.mark.usefixtures("small")
def test_mixed_deltas_beside_none_and_merged_sessions(measured):
    log = measured(f"{ENGINE};merged sessions in turn;{LORA8}")
    assert [name for name in log.names(LORA8) if "bf16" not in name] == [
        ENGINE,
        ENGINE + NO_DELTA,
        "merged sessions in turn",
        "merged sessions in turn, int8-row",
    ]
    assert log.last(ANSWERS, contender="merged sessions in turn")["relative"] <= 1e-5
    assert "relative" not in log.last(ANSWERS, contender=ENGINE + NO_DELTA)
    assert log.last(SUITE, suite=LORA8)["workloads"][LORA8]["sequences"] == 8
    assert [line for line in log.of(MISSING) if "bf16" not in line["contender"]] == []


@pytest.mark.usefixtures("small")
def test_who_cannot_take_part_is_missing_and_says_why(measured, monkeypatch):
    broken = replace(next(one for one in contenders.CONTENDERS if one.name == UNPADDED_ROW), name="broken", options={})
    liar = replace(
        next(one for one in contenders.CONTENDERS if one.name == UNPADDED),
        name="liar",
        options={"model": "{work}/no.onnx"},
    )
    monkeypatch.setattr(contenders, "CONTENDERS", (*contenders.CONTENDERS, broken, liar))
    log = measured("broken;liar;CTranslate2;1x16")
    why = {line["contender"]: line["why"] for line in log.of(MISSING)}
    assert why["broken"].startswith("open: TypeError: ")
    assert why["liar"].startswith("open: ")
    assert why["CTranslate2"].startswith("no environment 'ctranslate2' (ctranslate2==4.8.5 torch==")
    assert [line["contender"] for line in log.of(TIME)] == []
    assert any(line.startswith("broken: open: TypeError") for line in measured.said)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("wrong", ["64 mixed", "8x512"])  # all texts, or what long ones say at their end
def test_who_computes_something_else_is_not_timed(wrong, measured, monkeypatch):
    rows = cpu_run._Suite._rows

    def other(self, worker, one, workload):
        found = rows(self, worker, one, workload)
        return found * np.float32(1.001) if (one.name, workload) == (AGAIN, wrong) else found

    monkeypatch.setattr(cpu_run._Suite, "_rows", other)
    log = measured("again;1x16")
    why = log.last(MISSING, contender=AGAIN)["why"]
    assert f"its answers to {wrong} differ from those of {contenders.EAGER} by 1.0e-03 of their norm" in why
    assert {line["contender"] for line in log.of(TIME)} <= {UNPADDED}


@pytest.mark.usefixtures("small")
def test_who_dies_under_way_leaves_the_others(measured, monkeypatch):
    ask = InProcess.ask

    def dying(self, do, **fields):
        if do == "time" and self is mortal.get("worker"):
            raise Unsupported("it died at time")
        if do == "open" and "int8-row-logits" in str(fields):
            mortal["worker"] = self
        return ask(self, do, **fields)

    mortal: dict[str, InProcess] = {}
    monkeypatch.setattr(InProcess, "ask", dying)
    log = measured("unpadded, int8-row;again;1x16")
    assert log.last(MISSING, contender=UNPADDED_ROW)["why"] == "it died at time"
    assert {line["contender"] for line in log.of(TIME)} == {UNPADDED, AGAIN}


@pytest.mark.usefixtures("small")
def test_what_others_could_not_run_is_refused(encoder, tmp_path):
    for delta, why in (
        (
            tiny.delta(encoder, "x", FOLDS, TAGS),
            "'x' answers token-classification; expected classification or regression",
        ),
        (tiny.delta(encoder, "x", DELTAS["houlsby"][0], CLASSES), "'x' is no checkpoint that others could export"),
        (
            tiny.delta(encoder, "x", FOLDS, replace(CLASSES, head="linear", pooling="mean")),
            r"with the head of transformers \(train --method lora --head hf --pooling cls\)",
        ),
    ):
        with pytest.raises(Unsupported, match=why):
            run(encoder, delta, Inputs(), plan("1x16"), tmp_path / "work", tmp_path / "out", lambda _: None)


def test_without_a_delta_there_is_a_head_all_the_same(encoder):
    delta = bare(encoder)
    assert delta.kinds == ("probe",)
    assert any(tensor.any() for tensor in delta.head.values())
    assert not delta.effects(encoder.anatomy).low_rank


def test_a_step_is_made_once_for_the_same_file(encoder, delta, small, tmp_path, monkeypatch):
    made = []

    def copies(self, do, **fields):
        if do != "make":
            return ask(self, do, **fields)
        made.append(fields["maker"])
        target = fields["options"]["target"]
        source = tmp_path / "work" / "ours" / f"ours-unpadded-{'rows' if 'rows' in str(fields) else 'logits'}.onnx"
        with open(f"{target}/model.onnx", "wb") as file:
            file.write(source.read_bytes())
        return {"seconds": 0.0}

    ask = InProcess.ask
    monkeypatch.setattr(InProcess, "ask", copies)
    monkeypatch.setattr(cpu_run, "python_of", lambda environments, name: "python")
    for again in (False, True):
        log = run(
            encoder, delta, Inputs(), plan("optimum O0;1x16", again=again), tmp_path / "work", tmp_path / "out", print
        )
        assert made == ["make_optimum"] * 2  # of each form once
    assert log.names(ALONE) == [UNPADDED, "optimum O0"]
    assert log.last(OPENED, contender="optimum O0")["bytes"] > 0


def test_a_processor_is_named_with_its_flags(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(
        "cpu family\t: 6\nmodel\t\t: 207\nmodel name\t: X\nflags\t\t: fpu amx_int8 avx2 avx512f\n\n"
    )
    monkeypatch.setattr(cpu_run, "CPUINFO", tmp_path / "cpuinfo")
    name, flags = processor()
    assert name.endswith("-6-207")
    assert flags == ["avx2", "avx512f", "amx_int8"]


def test_energy_is_read_where_it_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_run, "RAPL", tmp_path)
    assert joules() is None
    for package, energy in ((0, 1_500_000), (1, 2_500_000)):
        (tmp_path / f"intel-rapl:{package}").mkdir()
        (tmp_path / f"intel-rapl:{package}" / "energy_uj").write_text(f"{energy}\n")
    assert joules() == 4.0


def test_options_are_filled_in():
    places = {"work": "/w", "width": "384"}
    assert filled({"a": "{work}/x", "b": "{width}", "c": True, "d": 128}, places) == {
        "a": "/w/x",
        "b": 384,
        "c": True,
        "d": 128,
    }


@pytest.mark.usefixtures("small")
def test_real_processes(measured, monkeypatch):
    """As it is measured: a process for each contender."""
    monkeypatch.setattr(cpu_run, "WorkerProcess", worker_process.WorkerProcess)
    log = measured("again;1x16")
    assert {line["contender"] for line in log.of(TIME)} == {UNPADDED, AGAIN}
    assert all(line["rss"] < 400e6 for line in log.of(OPENED, contender=UNPADDED))  # torch is not in it
