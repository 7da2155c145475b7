from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bertology_serve.api import load_delta
from bertology_serve.cli.evaluate import advice, check_comparable
from bertology_serve.cli.main import main
from bertology_serve.deltas import store
from bertology_serve.errors import SpecError
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.training import sets


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BERT, its data, and a delta trained on it."""
    folder = tmp_path_factory.mktemp("evaluate")
    bert = tiny.save("bert", folder / "bert")
    train = sets.write(folder / "train.jsonl", sets.classification())
    command = ["train", "--backbone", bert, "--task", "classification", "--train", train, "--eval", train]
    assert main([*command, "--out", str(folder / "mood"), "--epochs", "1"]) == 0
    return folder


def test_gives_the_metrics_that_training_saw(made, capsys):
    assert main(["evaluate", str(made / "mood"), "--input", str(made / "train.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = dict(store.load(made / "mood").metrics)
    expected.pop("loss")
    assert found["metrics"] == pytest.approx(expected)
    assert (found["delta"], found["task"], found["rows"]) == ("mood", "classification", 16)


def test_texts_that_are_cut_are_told(made, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "the film was good " * 99, "label": "up"}) + "\n")
    assert main(["evaluate", str(made / "mood"), "--input", str(rows)]) == 0
    assert "warning: 1 of 1 texts were cut to their delta's max_length" in capsys.readouterr().err
    assert main(["evaluate", str(made / "mood"), "--input", str(rows), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["truncated"] == 1


def test_where_many_texts_are_cut_windows_are_named():
    found = SimpleNamespace(truncated=2, answers=[{}] * 5, calibration=None, classes=[])
    assert advice(found, {}) == "40 % of the texts were cut: train with a larger --max-length, or --long windows"


def test_table_and_columns(made, capsys):
    rows = made / "rows.tsv"
    rows.write_text("body\tmood\nthe film was good\tup\nthe film was bad\tdown\n")
    arguments = ["evaluate", str(made / "mood"), "--input", str(rows), "--columns", "text=body,label=mood"]
    assert main([*arguments, "--backbone", str(made / "bert")]) == 0
    out, err = capsys.readouterr()
    assert "accuracy" in out
    assert "macro_f1" in out
    assert err.startswith("2 records in ")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"text": "good", "label": "sideways"}', "rows.jsonl:1: field 'label' has the unknown label 'sideways'"),
        ('{"text": "good"}', "rows.jsonl:1: field 'label' is missing"),
    ],
)
def test_bad_records_are_one_line(made, tmp_path, capsys, rows, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    assert main(["evaluate", str(made / "mood"), "--input", str(path)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_another_base_and_a_missing_delta(made, tmp_path, capsys):
    other = tiny.save("bert", tmp_path / "other", seed=1)
    capsys.readouterr()
    arguments = ["--input", str(made / "train.jsonl")]
    assert main(["evaluate", str(made / "mood"), *arguments, "--backbone", other]) == 2
    assert "was made for" in capsys.readouterr().err
    assert main(["evaluate", str(made / "nothing"), *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: no directory")


def test_everything_that_a_person_asks(made, tmp_path, capsys):
    """Errors, predictions, slices, another delta, figures: in files, tables and JSON."""
    rows = made / "train.jsonl"
    command = ["evaluate", str(made / "mood"), "--input", str(rows), "--by", "label", "--against", str(made / "mood")]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("errors", "output")}
    command += [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert main([*command, "--plots", str(tmp_path / "plots"), "--abstain", "1"]) == 0
    out, err = capsys.readouterr()
    for told in ("coverage", "calibration error", "of the constant", "by label", "McNemar's p", "right (down)"):
        assert told in out
    assert len(err.strip().splitlines()) == 2, "how long it took, and one sentence of advice"
    answers = [json.loads(line) for line in files["output"].read_text().splitlines()]
    assert len(answers) == 16
    assert answers[0]["record"]["text"]
    assert all((one["answer"]["label"] is None) == (one["answer"]["score"] < 1) for one in answers)
    assert all("quality" in json.loads(line) for line in files["errors"].read_text().splitlines())
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"reliability.png", "confusion.png"}
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["against"]["gain"]["value"] == 0
    assert found["baselines"]["constant"]["gain"].keys() == {"value", "low", "high"}
    assert {one["value"] for one in found["slices"]} == {"down", "up"}
    assert found["interval"]["metric"] == "accuracy"
    assert {one["label"] for one in found["classes"]} == {"down", "up"}
    assert 0 <= found["calibration"]["value"] <= 1
    assert found["advice"]


def test_where_results_cannot_go_is_one_line_and_nothing_is_lost(made, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the film was good", "label": "up"}\n')
    for target, told in ((rows, "is what is read"), (tmp_path / "no" / "x.jsonl", "x.jsonl"), (tmp_path, "directory")):
        assert main(["evaluate", str(made / "mood"), "--input", str(rows), "--errors", str(target)]) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("error: ")
        assert told in err
        assert ".tmp" not in err
    assert rows.read_text().count("\n") == 1


def test_a_column_that_the_delta_remembers_has_slices_and_other_labels_are_named(made, tmp_path, capsys):
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    named = tmp_path / "named.jsonl"
    named.write_text("".join(json.dumps({"sentence": row["text"], "mood": row["label"]}) + "\n" for row in rows))
    command = ["evaluate", str(made / "mood"), "--input", str(named), "--columns", "text=sentence,label=mood", "--json"]
    assert main([*command, "--by", "mood"]) == 0
    assert sum(one["rows"] for one in json.loads(capsys.readouterr().out)["slices"]) == len(rows)
    named.write_text(
        "".join(json.dumps({"text": row["text"], "mood": row["label"], "label": "x"}) + "\n" for row in rows)
    )
    assert main([*command[:4], "--columns", "label=mood", "--json", "--by", "label"]) == 0
    assert [one["value"] for one in json.loads(capsys.readouterr().out)["slices"]] == ["x"], "as the file has it"
    delta = load_delta(made / "mood")
    others = replace(delta, name="others", task=replace(delta.task, labels=("left", *delta.task.labels[1:])))
    with pytest.raises(SpecError, match=r"with other labels \(only one of them has down, left"):
        check_comparable(delta, others)
    with pytest.raises(SpecError, match="answers regression, mood classification; give a delta of the same task"):
        check_comparable(delta, replace(others, task=TaskSpec("regression")))


def test_zero_shot_is_measured_on_labels_it_never_saw(tmp_path, capsys):
    """Trained with texts for its labels and a template; then asked about others, beside the nearest label name."""
    bert, rows = tiny.save("bert", tmp_path / "bert"), sets.zero_shot()
    seen = sets.write(tmp_path / "seen.jsonl", [row for row in rows if row["label"] != "blue"])
    new = sets.write(tmp_path / "new.jsonl", [row for row in rows if row["label"] in ("blue", "red")])
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps({"red": "very red"}))
    command = ["train", "--backbone", bert, "--task", "zero-shot", "--train", seen, "--eval", seen, "--epochs", "2"]
    delta = tmp_path / "any"
    assert main([*command, "--label-texts", str(texts), "--template", "it was {}", "--out", str(delta)]) == 0
    spec = store.load(delta).task
    assert (spec.labels, spec.template) == (("early_warm", "red", "very_cold"), "it was {}")
    assert spec.label_texts == ("early warm", "very red", "very cold")
    assert spec.scale != 20.0, "calibrated"
    assert spec.bias != -10.0, "trained"
    capsys.readouterr()
    assert main(["evaluate", str(delta), "--input", new, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["label"] for one in found["classes"]] == ["blue", "red"]
    assert found["metrics"].keys() >= {"accuracy", "macro_f1"}
    assert found["baselines"].keys() == {"constant", "label names"}
    assert main(["evaluate", str(delta), "--input", new]) == 0
    assert "accuracy of the label names" in capsys.readouterr().out
    other = sets.write(tmp_path / "mood.jsonl", sets.classification())
    mood = ["train", "--backbone", bert, "--task", "classification", "--train", other, "--out", str(tmp_path / "mood")]
    assert main([*mood, "--template", "it was {}"]) == 2
    assert "label_texts and template are for zero-shot" in capsys.readouterr().err
