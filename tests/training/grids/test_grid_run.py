from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bertology_serve.errors import InputError
from bertology_serve.training.grids import grid_run as runs
from bertology_serve.training.grids.grid import Grid, GridMethod, GridTask
from bertology_serve.training.grids.grid_run import GridPlace, execute, result_of, write_report
from bertology_serve.training.trainer import Trainer
from tests.training import sets

TRAIN = {"epochs": 2, "batch_size": 4, "max_length": 16, "keep": "last"}


@pytest.fixture
def place(tmp_path: Path, bert_path: Path) -> GridPlace:
    sets.write(tmp_path / "mood.jsonl", sets.classification())
    return GridPlace(tmp_path / "out", tmp_path, str(bert_path))


def grid(place: GridPlace, *methods: GridMethod, **values: Any) -> Grid:
    files: dict[str, Any] = {"train_file": "mood.jsonl", "eval_file": "mood.jsonl", "ood": {"far": "mood.jsonl"}}
    task = GridTask("Mood", "classification", **{**files, **values}, metric="accuracy", rows=10, eval_rows=8)
    return Grid("A grid", place.backbone, (task,), methods, train=TRAIN)


LORA = GridMethod("LoRA", {"method": "lora", "rank": 2})
EH = GridMethod("EH-FT", {"recipe": "eh-ft", "method": "bitfit", "first_epochs": 1, "gradient_steps": 3})


def test_a_run_leaves_its_figures_and_its_costs(place: GridPlace):
    made = grid(place, LORA, EH)
    lora, full = (execute(run, place) for run in made.runs())
    assert (lora["rows"], lora["measured_rows"]) == (10, {"": 8, "far": 8})
    assert set(lora["measured"]["far"]) == {"accuracy", "macro_f1", "mcc"}
    assert (lora["delta_parameters"], lora["trained_parameters"]) == (2 * 3 * 2 * 2 * 32, 2 * 3 * 2 * 2 * 32 + 66)
    scalars = 8 * 4  # AdamW counts steps for each of four tensors
    assert lora["optimizer_bytes"] == pytest.approx(2 * 4 * lora["trained_parameters"], abs=scalars)
    assert (lora["steps"], full["steps"]) == (6, 9)
    assert full["optimizer_bytes"] > 2 * 4 * 20_000
    assert lora["peak_bytes"] is None or lora["peak_bytes"] > 10**7
    folder = place.directory(list(made.runs())[1])
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "result.json", "spec.json"]
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert sum("layer_norms" in line for line in logged) == 6, "three steps of each stage"


def test_what_is_finished_is_not_made_again_and_what_changed_is(place: GridPlace, monkeypatch: pytest.MonkeyPatch):
    run = next(grid(place, LORA).runs())
    assert result_of(run, place) is None
    made = execute(run, place)
    assert result_of(run, place) == made
    assert result_of(replace(run, config=run.config.replaced(epochs=3)), place) is None
    assert result_of(run, replace(place, backbone="another")) is None
    spec = place.directory(run) / "spec.json"
    older = json.loads(spec.read_text())
    del older["training"]["gradient_steps"]
    spec.write_text(json.dumps(older))
    assert result_of(run, place) == made, "a field that is newer than the run had its default"


def test_a_run_on_other_data_is_made_again(place: GridPlace):
    run = next(grid(place, LORA).runs())
    made = execute(run, place)
    rows = sets.classification()
    sets.write(place.data / "mood.jsonl", [{**row, "text": f"{row['text']} indeed"} for row in rows])
    assert result_of(run, place) is None
    again = execute(run, place)
    assert again["data"] != made["data"]
    assert result_of(run, place) == again
    (place.data / "mood.jsonl").unlink()
    assert result_of(run, place) == again, "without its data a result is still one"


def test_a_killed_run_is_continued(place: GridPlace, monkeypatch: pytest.MonkeyPatch):
    run = next(grid(place, LORA).runs())
    expected = execute(run, place)
    (place.directory(run) / "result.json").unlink()
    monkeypatch.setattr(runs, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        execute(run, place)
    assert result_of(run, place) is None
    monkeypatch.undo()
    again = execute(run, place)
    assert again["measured"] == expected["measured"]


def test_a_run_killed_in_training_goes_on_from_its_checkpoint(place: GridPlace, monkeypatch: pytest.MonkeyPatch):
    run = next(grid(place, GridMethod("LoRA", {"method": "lora", "rank": 2, "save_every": 1, "epochs": 4})).runs())
    expected = execute(run, place)
    (place.directory(run) / "result.json").unlink()
    steps = []

    def update(self: Trainer, loss: float) -> Any:
        steps.append(self.state.step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return plain(self, loss)

    plain = Trainer._update
    monkeypatch.setattr(Trainer, "_update", update)
    with pytest.raises(KeyboardInterrupt):
        execute(run, place)
    again = execute(run, place)
    assert steps == [*range(6), *range(5, 12)], "not from the beginning"
    assert (again["measured"], again["steps"]) == (expected["measured"], expected["steps"])


def test_the_best_state_may_be_kept_and_so_may_deltas(place: GridPlace):
    run = next(grid(place, GridMethod("LoRA", {"method": "lora", "keep": "best"})).runs())
    execute(run, replace(place, keep=True))
    manifest = json.loads((place.directory(run) / "delta" / "delta.json").read_text())
    assert manifest["provenance"]["eval"]["rows"] == 8


def test_a_known_set_is_measured_as_its_makers_do(place: GridPlace, tmp_path: Path):
    names = {"up": "equivalent", "down": "not"}
    rows = [{"text_a": row["text"], "text_b": "a film", "label": names[row["label"]]} for row in sets.classification()]
    (tmp_path / "glue" / "mrpc").mkdir(parents=True)
    for split in ("train", "dev"):
        sets.write(tmp_path / "glue" / "mrpc" / f"{split}.jsonl", rows)
    task = GridTask("MRPC", data="mrpc")
    assert place.find("set:glue/mrpc:dev") == f"set:glue/mrpc@{tmp_path / 'glue' / 'mrpc'}:dev"
    assert (place.find("set:glue/rte:dev"), place.find("hub:x")) == ("set:glue/rte:dev", "hub:x")
    found = execute(next(replace(grid(place, LORA), tasks=(task,)).runs()), place)
    assert set(found["measured"][""]) == {"accuracy", "macro_f1", "mcc", "f1"}


def test_a_metric_that_the_task_lacks_is_named(place: GridPlace):
    made = grid(place, LORA)
    with pytest.raises(InputError, match="Mood has no metric 'acuracy'; did you mean 'accuracy'"):
        execute(next(replace(made, tasks=(replace(made.tasks[0], metric="acuracy"),)).runs()), place)


def test_report_is_of_what_is_there(place: GridPlace):
    made = grid(place, LORA, EH)
    execute(next(made.runs()), place)
    write_report(made, place)
    assert "Runs that are missing: Mood 1 of 2." in (place.out / "table.md").read_text()
    assert (place.out / "runs.csv").read_text().count("\n") == 7, "three metrics of two files, and a header"
    assert (place.out / "table.csv").exists()
