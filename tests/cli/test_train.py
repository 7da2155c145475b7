from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bertology_serve.cli.main import main
from bertology_serve.cli.train import read_columns
from bertology_serve.errors import SpecError
from tests import tiny
from tests.bits import same_bits
from tests.serving.running import wait
from tests.training import sets


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a small random BERT."""
    return tiny.save("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def train_file(tmp_path: Path) -> str:
    """Sixteen plain sentences."""
    return sets.write(tmp_path / "train.jsonl", sets.classification())


def arguments(bert: str, train_file: str, out: Path, *more: str) -> list[str]:
    return ["train", "--backbone", bert, "--task", "classification", "--train", train_file, "--out", str(out), *more]


def test_trains_measures_and_says_what_is_next(bert, train_file, tmp_path, capsys):
    out = tmp_path / "deltas" / "mood"
    assert (
        main(
            arguments(bert, train_file, out, "--eval", train_file, "--epochs", "2", "--rank", "2", "--start", "random")
        )
        == 0
    )
    table, notes = capsys.readouterr()
    assert "accuracy" in table
    assert "834 (3.2 %)" in table, "2 matrices of 3 layers, and 66 in the head"
    assert notes.startswith("pooling cls (it has a pooler); head hf, at random; ")
    assert "lora at 0.001; 2 epochs\ntraining " in notes
    assert "epoch 1, step 1 of 2: loss 0." in notes
    assert f"bertology-serve evaluate {out} --input {train_file}" in notes
    assert json.loads((out / "delta.json").read_text())["kinds"]["lora"]["rank"] == 2
    assert [path.name for path in out.parent.iterdir()] == ["mood"]


def test_the_probe_comes_first_and_the_table_shows_what_there_is_to_beat(bert, train_file, tmp_path, capsys):
    assert main(arguments(bert, train_file, tmp_path / "mood", "--eval", train_file, "--epochs", "1")) == 0
    table, notes = capsys.readouterr()
    assert notes.startswith(
        "pooling cls (it has a pooler); head linear; contrastive start; lora at 0.003; 1 epochs (for 16 rows)\n"
        "stage 1 of 2: probe, solved"
    )
    assert all(name in table for name in ("delta", "constant", "0.5000"))
    assert "no step was better than the probe on these records: the probe is what was saved" in notes
    assert json.loads((tmp_path / "mood" / "delta.json").read_text())["kinds"] == {}


def test_columns_methods_and_their_options(bert, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("sentence,y\n" + "".join(f"{r['text']},{r['label']}\n" for r in sets.classification()))
    more = [
        "--columns",
        "text=sentence, label=y",
        "--method",
        "lora,bitfit",
        "--targets",
        "q,v,key",
        "--biases",
        "attention",
    ]
    more += ["--name", "mood", "--version", "3", "--epochs", "1", "--pooling", "mean", "--no-trunk-dropout"]
    assert main(arguments(bert, str(rows), tmp_path / "mood", *more)) == 0
    values = json.loads((tmp_path / "mood" / "3" / "delta.json").read_text())
    assert values["kinds"]["lora"]["targets"] == ["q", "v", "key"]
    assert values["kinds"]["bitfit"] == {"biases": "attention"}
    assert values["task"]["pooling"] == "mean"
    assert values["provenance"]["training"]["trunk_dropout"] is False
    assert "mood 3" in capsys.readouterr().out


def test_the_next_command_works_when_it_is_pasted(bert, tmp_path, capsys):
    """Also with names that a shell would take apart, and with columns, which the delta remembers."""
    rows = tmp_path / "it's here.csv"
    header = 'index,"Tweet, clean ",mood'
    rows.write_text(
        f"{header}\n" + "".join(f"{i},{r['text']},{r['label']}\n" for i, r in enumerate(sets.classification()))
    )
    more = ["--columns", '"text=Tweet, clean",label=mood', "--eval", str(rows), "--epochs", "1"]
    assert main(arguments(bert, str(rows), tmp_path / "my deltas" / "mood", *more)) == 0
    lines = capsys.readouterr().err.splitlines()
    words = shlex.split(next(line for line in lines if "evaluate" in line))
    assert words == ["bertology-serve", "evaluate", str(tmp_path / "my deltas" / "mood"), "--input", str(rows)]
    assert main([*words[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 16
    plain = sets.write(tmp_path / "plain.jsonl", sets.classification())
    assert main([*words[1:3], "--input", plain, "--json"]) == 0, "records with the fields' own names need no columns"
    assert main([*words[1:], "--columns", "text=body"]) == 2
    assert "no column 'body' for 'text'" in capsys.readouterr().err
    serve = shlex.split(next(line for line in lines if "serve --backbone" in line))
    assert serve[serve.index("--deltas") + 1] == str(tmp_path / "my deltas")


def test_recipe_says_its_stages_and_gives_two_products(bert, train_file, tmp_path, capsys):
    more = ["--recipe", "eh-ft", "--method", "bitfit", "--epochs", "1"]
    assert main(arguments(bert, train_file, tmp_path / "deltas" / "x", *more)) == 0
    notes = capsys.readouterr().err.splitlines()
    assert notes[1] == "stage 1 of 2: bitfit"
    assert "stage 2 of 2: full, with the head of the stage before" in notes
    assert sorted(path.name for path in (tmp_path / "deltas").iterdir()) == ["x", "x-bitfit"]
    assert main(arguments(bert, train_file, tmp_path / "deltas" / "y", *more, "--dry-run")) == 0
    assert capsys.readouterr().out.count("would train") == 2


def test_lp_shows_what_every_layer_can_do(bert, train_file, tmp_path, capsys):
    more = ["--recipe", "lp", "--lp-layers", "all", "--lp-path", "3", "--eval", train_file]
    assert main(arguments(bert, train_file, tmp_path / "x", *more)) == 0
    out, notes = capsys.readouterr()
    assert "one probe a layer" in out
    assert sum(line.startswith("layer ") for line in notes.splitlines()) == 4
    assert "steps                 │ 12 (kept:" in out


def test_plot_and_another_domain(bert, train_file, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the plots extra is not installed")
    more = [
        "--tensorboard",
        str(tmp_path / "board"),
        "--plot",
        "--eval",
        train_file,
        "--ood",
        train_file,
        "--recipe",
        "lp-ft",
        "--epochs",
        "1",
    ]
    assert main(arguments(bert, train_file, tmp_path / "x", *more)) == 0
    assert "ood_accuracy" in capsys.readouterr().out
    assert (tmp_path / "x" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", str(tmp_path / "x")]) == 0
    (events,) = (tmp_path / "board" / "x").iterdir()
    assert b"stage 2/eval/accuracy" in events.read_bytes()


def test_dry_run_counts_and_writes_nothing(bert, train_file, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert (
        main(arguments(bert, train_file, tmp_path / "x", "--dry-run", "--method", "prompt", "--prompt-length", "5"))
        == 0
    )
    out = capsys.readouterr().out
    assert "would train 226 parameters" in out
    assert "after_cls" in out
    assert "activations" in out
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "lore"], "unknown method 'lore'; did you mean 'lora'"),
        (["--task", "clasification"], "unknown task 'clasification'; did you mean 'classification'"),
        (["--rank", "0"], "rank is 0; expected a number above 0"),
        (["--targets", "querry"], "bert has no slot 'querry'; did you mean 'query'"),
        (["--biases", "all"], "options of 'bitfit' were given, but the method is lora"),
        (["--epochs", "0"], "epochs is 0"),
        (["--columns", "text"], "--columns is 'text'; expected FIELD=COLUMN"),
        (["--columns", "text=body"], "no column 'body' for 'text'"),
        (["--train", "nowhere.jsonl"], "no file nowhere.jsonl"),
        (["--backbone", "/no/such/model"], "no encoder '/no/such/model'"),
        (["--name", "../up"], "delta name '../up' cannot be used"),
        (["--name", "base"], "delta name 'base' is taken by the encoder itself"),
        (["--max-length", "1000"], "max_length is 1000, but"),
        (["--task", "regression"], "field 'label' is 'up' (str); expected a finite number"),
        (["--task", "embedding", "--method", "probe"], "field 'text_pair' (or 'positive') is missing"),
        (["--loss", "mnrl"], "loss mnrl is for embedding, sparse, multi-vector, not classification; leave it out"),
        (["--task", "embedding", "--loss", "mnlr"], "'mnlr'"),
        (["--matryoshka", "8,4"], "dimensions do not fit classification; only embeddings can be cut"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--layers", "0,x"], "layers is 'x'; expected numbers from 0 and ranges"),
        (["--layers", "7"], "layers is '7'; the encoder has 3 layers, 0 to 2"),
        (["--labels", "up"], "has the unknown label 'down'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(bert, train_file, tmp_path, capsys, more, message):
    before = sorted(tmp_path.iterdir())
    assert main(arguments(bert, train_file, tmp_path / "x", *more)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "good", "label": "up"}\n{"text": "bad", "la', "rows.jsonl:2"),
        ('{"text": "", "label": "up"}\n{"text": "bad", "label": "down"}\n', "rows.jsonl:1: field 'text' is empty"),
        ('{"label": "up"}\n{"label": "down"}\n', "field 'text' is missing"),
        ('{"text": "good", "label": "up"}\n', "holds only the label up; expected at least two"),
        ("", "holds no records"),
    ],
)
def test_bad_data_names_file_and_row(bert, tmp_path, capsys, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert main(arguments(bert, str(path), tmp_path / "x")) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_what_stands_there_is_not_overwritten(bert, train_file, tmp_path, capsys):
    out = tmp_path / "x"
    assert main(arguments(bert, train_file, out, "--epochs", "1")) == 0
    assert main(arguments(bert, train_file, out, "--epochs", "1")) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {out} exists; choose another --out")
    assert main(arguments(bert, train_file, out, "--epochs", "1", "--overwrite")) == 0


def test_a_copy_that_differs_is_exit_code_1(bert, train_file, tmp_path, capsys, monkeypatch):
    import bertology_serve.training.publish as publishing

    monkeypatch.setattr(publishing, "rounding", lambda *_: -1.0)
    assert main(arguments(bert, train_file, tmp_path / "x", "--epochs", "1")) == 1
    assert "nothing was published" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_interrupt_says_how_to_continue(bert, train_file, tmp_path, capsys, monkeypatch):
    import bertology_serve.training.trainer as loop

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "measure", interrupted)
    assert main(arguments(bert, train_file, tmp_path / "x", "--eval", train_file, "--start", "probe")) == 130
    assert "stopped at step 1; --resume continues from the last checkpoint" in capsys.readouterr().err


@same_bits
@pytest.mark.parametrize(
    ("own", "lines", "file"),
    [
        (["--epochs", "20", "--start", "random"], 20, "adapter_model.safetensors"),
        (["--epochs", "10", "--recipe", "eh-ft"], 60, "model.safetensors"),
    ],
    ids=["lora", "eh-ft"],
)
def test_killed_run_resumes_to_the_same_bytes(bert, train_file, tmp_path, own, lines, file):
    """kill -9 in the middle, then --resume: the file of weights is that of a run that was left alone."""
    more = ["--eval", train_file, "--batch-size", "4", "--save-every", "3", "--dropout", "0.1", *own]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def command(out: Path, *flags: str) -> list[str]:
        return [sys.executable, "-m", "bertology_serve", *arguments(bert, train_file, out, *more, *flags)]

    process = subprocess.Popen(command(tmp_path / "killed"), env=environment, stderr=subprocess.DEVNULL)
    log = tmp_path / ".killed.run" / "log.jsonl"
    wait(lambda: (log.exists() and log.read_text().count("\n") > lines) or process.poll() is not None, 600)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    for command_line in (command(tmp_path / "killed", "--resume"), command(tmp_path / "straight")):
        done = subprocess.run(command_line, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if "--resume" in command_line:
            assert "continuing after step" in done.stderr
    weights = [(tmp_path / name / file).read_bytes() for name in ("killed", "straight")]
    assert weights[0] == weights[1]
    steps = [len((tmp_path / name / "log.jsonl").read_text().splitlines()) for name in ("killed", "straight")]
    assert steps == [100, 100]


def test_a_cosine_that_is_better_is_named():
    from types import SimpleNamespace

    from bertology_serve.cli.train import advice
    from bertology_serve.tasks.spec import TaskSpec
    from bertology_serve.training.run_directory import RunState

    known = {"cosine": {"spearman": 0.9}, "probe": {"spearman": 0.4}}
    delta = SimpleNamespace(task=TaskSpec("regression"), metrics={"spearman": 0.5}, provenance={})
    outcome = SimpleNamespace(delta=delta, state=RunState(), baselines=known, unimproved=False)
    said = list(advice(outcome))  # type: ignore[arg-type]
    assert any("ask the encoder itself, or take --task embedding" in line for line in said)
    assert any("-40.0 points beside cosine (90.0)" in line for line in said)
    delta.provenance["gain"] = {"over": "probe", "metric": "spearman", "value": 0.1, "low": -0.1, "high": 0.3}
    assert any("not surely better than the probe" in line for line in advice(outcome))  # type: ignore[arg-type]
    delta.metrics = {"spearman": 0.95}
    assert not any("ask the encoder itself" in line for line in advice(outcome))  # type: ignore[arg-type]


def test_embeddings_are_chosen_by_a_retrieval_set(bert, tmp_path, capsys):
    """BEIR's layout in --eval and in evaluate, with the encoder's own cosine beside; predict and serve as ever."""
    pairs = sets.write(tmp_path / "pairs.jsonl", [{"anchor": f"the {t}", "positive": f"a {t}"} for t in sets.THINGS])
    folder, out = tmp_path / "set", tmp_path / "deltas" / "near"
    folder.mkdir()
    sets.write(folder / "corpus.jsonl", [{"_id": t, "title": "", "text": f"one {t} here"} for t in sets.THINGS])
    sets.write(folder / "queries.jsonl", [{"_id": f"q-{t}", "text": f"where is the {t} ?"} for t in sets.THINGS])
    judged = "".join(f"q-{t}\t{t}\t1\n" for t in sets.THINGS)
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    own = [
        "--task",
        "embedding",
        "--eval",
        str(folder),
        "--batch-size",
        "4",
        "--epochs",
        "2",
        "--loss",
        "mnrl-symmetric",
    ]
    assert main(arguments(bert, pairs, out, *own)) == 0
    table, notes = capsys.readouterr()
    assert "loss mnrl-symmetric; lora at " in notes
    assert "no step was better than the start" in notes or "ndcg@10: +" in notes
    assert all(name in table for name in ("ndcg@10", "mrr@10", "map", "recall@1", "recall@100"))
    delta = json.loads((out / "delta.json").read_text())
    assert delta["metrics"]["ndcg@10"] >= delta["provenance"]["baselines"]["cosine"]["ndcg@10"]
    assert main(["evaluate", str(out), "--input", str(folder), "--json", "--errors", str(tmp_path / "wrong")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"] == pytest.approx(delta["metrics"], abs=1e-5)
    assert found["interval"]["metric"] == "ndcg@10"
    wrong = [json.loads(line)["record"] for line in (tmp_path / "wrong").read_text().splitlines()]
    assert all("relevant" in record for record in wrong)


@pytest.fixture
def auto_flags(tmp_path: Path) -> list[str]:
    """A search over 14 rows; the probe of one C, the smallest, is a constant, which any training is better than."""
    rows = sets.classification()[2:]
    files = {"train": sets.write(tmp_path / "few.jsonl", rows), "eval": sets.write(tmp_path / "dev.jsonl", rows * 8)}
    own = {**files, "method": "auto", "budget": "60", "batch-size": "4", "lp-path": "1", "max-length": "32"}
    return [text for name, value in own.items() for text in (f"--{name}", value)]


def auto(bert: str, out: Path, *flags: str) -> list[str]:
    return ["train", "--backbone", bert, "--task", "classification", "--out", str(out), *flags]


def test_a_search_shows_its_board_and_what_it_would_try(bert, auto_flags, tmp_path, capsys):
    assert main(auto(bert, tmp_path / "mood", *auto_flags, "--dry-run")) == 0
    assert "would try 9 candidates" in capsys.readouterr().out
    assert main(auto(bert, tmp_path / "mood", *auto_flags, "--tensorboard", str(tmp_path / "tb"))) == 2
    assert "a search or --folds has many" in capsys.readouterr().err
    assert not (tmp_path / ".mood.run").exists()
    assert main(auto(bert, tmp_path / "mood", *auto_flags, "--plot")) == 0
    table, notes = capsys.readouterr()
    assert "lora-wide-slow" in table
    assert re.search(r"dropped after step \d+", notes), notes
    assert "the highest of those that made all steps (of 9 candidates); the probe, where all began, has" in notes
    assert f"evaluate {tmp_path / 'mood'}" in notes
    assert (tmp_path / "mood" / "curve.png").exists()
    assert main(["train", "--config", str(tmp_path / "mood" / "config.toml"), "--out", str(tmp_path / "again")]) == 0
    metrics = [json.loads((tmp_path / name / "delta.json").read_text())["metrics"] for name in ("mood", "again")]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-3)


@same_bits
def test_a_killed_search_resumes_to_the_same_winner(bert, auto_flags, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def command(out: Path, *flags: str) -> list[str]:
        return [sys.executable, "-m", "bertology_serve", *auto(bert, out, *auto_flags, "--save-every", "3", *flags)]

    process = subprocess.Popen(command(tmp_path / "killed"), env=environment, stderr=subprocess.DEVNULL)
    log = tmp_path / ".killed.run" / "lora.log.jsonl"
    wait(lambda: (log.exists() and log.read_text().count("\n") > 7) or process.poll() is not None, 600)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    for command_line in (command(tmp_path / "killed", "--resume"), command(tmp_path / "straight")):
        done = subprocess.run(command_line, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("continuing after step" in done.stderr) is ("--resume" in command_line)
    found = [json.loads((tmp_path / name / "delta.json").read_text()) for name in ("killed", "straight")]
    boards = [[{**row, "seconds": 0} for row in one["provenance"]["auto"]["board"]] for one in found]
    assert boards[0] == boards[1]
    assert found[0]["tensors"] == found[1]["tensors"]
    (file,) = found[0]["files"]
    weights = [(tmp_path / name / file).read_bytes() for name in ("killed", "straight")]
    assert weights[0] == weights[1]


def test_columns_are_pairs():
    assert read_columns(None) == {}
    assert read_columns("text=a, label = b") == {"text": "a", "label": "b"}
    assert read_columns('"text=a, b",label=c=d') == {"text": "a, b", "label": "c=d"}
    for text in ("text", "=a", "text="):
        with pytest.raises(SpecError, match="expected FIELD=COLUMN"):
            read_columns(text)


def test_a_dry_run_looks_at_all_files_and_says_what_labels_lack(bert, tmp_path, capsys):
    rows = [{"text": row["text"], "label": [1, 0] if row["label"] == "up" else [0, 1]} for row in sets.classification()]
    train, bad = (
        sets.write(tmp_path / "t.jsonl", rows),
        sets.write(tmp_path / "e.jsonl", [*rows, {"text": "x", "label": "z"}]),
    )
    command = [
        "train",
        "--backbone",
        bert,
        "--task",
        "multi-label",
        "--train",
        train,
        "--dry-run",
        "--max-length",
        "32",
    ]
    assert main([*command, "--eval", bad]) == 2
    assert f"{bad}:17" in capsys.readouterr().err
    assert main([*command, "--eval", bad, "--skip-bad"]) == 0
    told = capsys.readouterr().err
    assert "labels are lists of 2 numbers without names, which are called 0 to 1: give --labels" in told
    assert f"skipped 1 records:\n  {bad}:17" in told
    assert "t.jsonl: 16 records, none of them wrong" in told
