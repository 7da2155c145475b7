from __future__ import annotations

import csv

import pytest

from bertology_serve.bench.cpu.contenders import (
    ARRANGED,
    ARRIVES,
    DENSE,
    DENSE_ROW,
    EAGER,
    ENGINE,
    LORA8,
    NO_DELTA,
    OLIVE,
    ONNX_ENGINE,
    OPTIMUM_O0,
    OPTIMUM_O3,
    UNPADDED,
    UNPADDED_ROW,
)
from bertology_serve.bench.cpu.cpu_log import HEADER, MISSING, Log
from bertology_serve.bench.cpu.cpu_report import Bar, header, index, judge, missing, write
from tests.bench.cpu.measured import WHERE, alone, suite

ROW = f"{ONNX_ENGINE}, int8-row"
OV8, CT8 = "OpenVINO, int8 calibrated", "CTranslate2, int8"
TIMES = {
    UNPADDED: 2.0, DENSE: 2.1, EAGER: 4.0, OPTIMUM_O0: 2.2, OPTIMUM_O3: 2.2, OLIVE: 2.6, "OpenVINO": 1.9,
    DENSE_ROW: 1.0, UNPADDED_ROW: 1.25, OV8: 0.9, CT8: 0.5, f"{ENGINE}, bf16": 0.8, "OpenVINO, bf16": 1.2,
}  # fmt: skip
GOOD = {"cosine": 0.998, "worst": 0.99, "neighbours": 0.0, "metrics": {"accuracy": 0.8}}
ANSWERS = {name: GOOD for name in TIMES} | {CT8: GOOD | {"cosine": 0.9}}


def verdicts(log: Log) -> dict[str, tuple[float | None, str]]:
    return {one.name: (one.measured and round(one.measured, 3), one.verdict) for one in judge(log)}


def test_every_bar_of_one_model_is_judged(tmp_path):
    log = alone(tmp_path / "log.jsonl", TIMES, **ANSWERS)
    assert verdicts(log) == {
        "others ÷ ours, fp32, 8x128": (0.95, "missed"),
        "others ÷ ours, 16 bits, 8x128": (1.5, "holds"),
        "others ÷ ours, 8 bits, 8x128": (0.9, "missed"),  # not CTranslate2, whose rows are others
        "dense against optimum O0, 8x128": (1.048, "holds"),
        "dense against optimum O3, 8x128": (1.048, "missed"),
        "dense against Olive, 8x128": (1.238, "holds"),
        "unpadded against dense, 64 mixed": (None, "not measured"),
        "unpadded against dense, 8x128": (1.05, "holds"),
        "dense int8-row against fp32, 8x128": (2.1, "holds"),
        "unpadded int8-row against fp32, 64 mixed": (None, "not measured"),
        "exported graph ÷ torch engine, 64 mixed": (None, "not measured"),
        "int8-row, cosine of embeddings": (0.998, "holds"),
        "int8-row, change of a row by its neighbours": (0.0, "holds"),
        "int8-row, change of accuracy in points": (0.0, "holds"),
        "export without verification, seconds": (0.5, "holds"),
        "forms whose bytes differ between exports": (0.0, "holds"),
    }
    assert judge(log)[0].of == "OpenVINO ÷ ours, unpadded"


@pytest.mark.parametrize(("accuracy", "fastest"), [(0.79, "None"), (0.796, OV8), (0.9, OV8)])
def test_who_loses_accuracy_is_not_compared_with(accuracy, fastest, tmp_path):
    worse = GOOD | {"metrics": {"accuracy": accuracy, "mcc": 0.0}}
    log = alone(tmp_path / "log.jsonl", TIMES, **ANSWERS | {OV8: worse})
    found = next(one for one in judge(log) if "8 bits" in one.name)
    assert (found.measured is None) == (fastest == "None")
    assert found.of.startswith(fastest if found.measured else "")


def test_mixed_texts_have_bars_of_their_own(tmp_path):
    log = alone(tmp_path / "log.jsonl", TIMES | {ENGINE: 1.8}, "64 mixed", **ANSWERS)
    found = verdicts(log)
    assert found["others ÷ ours, 8 bits, 64 mixed"] == (0.9, "missed")
    assert next(one for one in judge(log) if "8 bits" in one.name).promise == "≥ 1.5"
    assert found["unpadded int8-row against fp32, 64 mixed"] == (1.6, "missed")
    assert found["exported graph ÷ torch engine, 64 mixed"] == (1.111, "holds")


def test_mixed_deltas_are_judged_beside_none_and_peft(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.add(HEADER, **WHERE)
    names = {ENGINE: 1.0, ENGINE + NO_DELTA: 0.96, ROW: 0.5, ROW + NO_DELTA: 0.4, ARRIVES: 9.5, ARRANGED: 2.5}
    suite(log, LORA8, ENGINE, {LORA8: names})
    found = verdicts(log)
    assert found[f"{LORA8} ÷ none, {ENGINE}"] == (1.042, "holds")
    assert found[f"{LORA8} ÷ none, {ROW}"] == (1.25, "missed")
    assert found[f"{LORA8} ÷ none, {ONNX_ENGINE}"] == (None, "not measured")
    assert found[f"{ARRIVES} ÷ ours, fp32"] == (9.5, "holds")
    assert found[f"{ARRANGED} ÷ ours, fp32"] == (2.5, "missed")
    assert found[f"{ARRIVES} ÷ ours, 8 bits"] == (19.0, "missed")


@pytest.mark.parametrize(
    ("name", "changes", "bar"),
    [
        (UNPADDED_ROW, {"metrics": {"accuracy": 0.79}}, "int8-row, change of accuracy in points"),
        (DENSE_ROW, {"neighbours": 1e-9}, "int8-row, change of a row by its neighbours"),
        (DENSE_ROW, {"cosine": 0.996}, "int8-row, cosine of embeddings"),
    ],
)
def test_what_is_missed_is_said(name, changes, bar, tmp_path):
    log = alone(tmp_path / "log.jsonl", TIMES, **ANSWERS | {name: GOOD | changes})
    assert verdicts(log)[bar][1] == "missed"


def test_who_is_missing_is_said_once_for_a_reason(tmp_path):
    log = alone(tmp_path / "log.jsonl", TIMES)
    for name, why in (("fastembed", "no wheel"), ("CTranslate2", "no wheel"), (OV8, "it was timed before")):
        log.add(MISSING, suite="one model", contender=name, why=why)
    assert missing(log)[0] == "fastembed, CTranslate2: no wheel"
    assert [one.partition(":")[0] for one in missing(log)[1:]] == ["llama.cpp"]


def test_tables_figures_and_a_picture_are_written(tmp_path):
    log = alone(tmp_path / "epyc" / "minilm.jsonl", TIMES, **ANSWERS)
    files = write(log)
    assert [path.name for path in files] == ["minilm.md", "minilm.csv", "minilm.png"]
    text = files[0].read_text()
    assert "\n| torch eager | fp32 | 2.00 (125) |" in text
    assert "| ours, unpadded | 256 | 512 | 90 | 0.8000 | - | - | 0.99800 | 0.99000 | 0.0e+00 | 0.50 |" in text
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    assert len(rows) == 3 * len(TIMES)
    assert rows[0]["processor"] == "epyc-25-17"
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_processors_stand_side_by_side(tmp_path):
    alone(tmp_path / "epyc" / "minilm.jsonl", TIMES, **ANSWERS)
    alone(tmp_path / "xeon" / "minilm.jsonl", TIMES | {"OpenVINO": 1.0}, **ANSWERS)
    lines = index(tmp_path).read_text().splitlines()
    assert "| promise | bar | [minilm](epyc/minilm.md), epyc | [minilm](xeon/minilm.md), xeon |" in lines
    assert "| others ÷ ours, fp32, 8x128 | ≥ 1 | 0.95 | 0.5 |" in lines


def test_the_header_says_where_and_in_what_mood(tmp_path):
    log = alone(tmp_path / "log.jsonl", TIMES)
    expected = "EPYC (epyc-25-17; avx2), 1 of 2 cores, 2026-11-30, load 0.2; no joules. bertology-serve 0.1.0, openvino"
    assert header(log).startswith(expected)
    log.add(HEADER, **WHERE | {"load_before": 3.0, "date": "2026-12-01T00:00:00"})
    assert "2026-11-30 to 2026-12-01, busy machine (load 3.0); " in header(log)


def test_promises_read_as_they_are_judged():
    assert (Bar("x", 1.0, least=1.1).promise, Bar("x", 1.0, most=2).promise) == ("≥ 1.1", "≤ 2")
