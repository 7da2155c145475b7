from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bertology_serve.errors import NotFound, SpecError
from bertology_serve.training.grids.grid import Grid, GridTask, find_grid, presets, read_grid, slug
from tests.training.grids import made

TEXT = """
title = "Ranks"
backbone = "tiny"
seeds = [0, 1]
[train]
epochs = 7
learning_rate = 1e-3
[[tasks]]
name = "Mood (2)"
task = "classification"
train = "train.jsonl"
eval = "dev.jsonl"
metric = "accuracy"
flags = { epochs = 2 }
[[methods]]
name = "LoRA"
train = { method = "lora", targets = "query,key" }
vary = { rank = [1, 4], batch_size = [8] }
tasks."Mood (2)" = { learning_rate = 1e-2 }
[[methods]]
name = "FT"
train = { method = "full" }
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_runs_are_methods_by_values_by_tasks_by_seeds(tmp_path: Path):
    runs = list(read_grid(written(tmp_path, TEXT)).runs())
    names = [f"mood-2/{row}/seed-{seed}" for seed in (0, 1) for row in
             ("lora-rank-1-batch-size-8", "lora-rank-4-batch-size-8", "ft")]  # fmt: skip
    assert [run.key for run in runs] == names
    assert runs[1].row == "LoRA, rank 4, batch size 8"
    config = runs[1].config
    assert config.options == {"lora": {"rank": 4, "targets": ("query", "key")}}
    assert (config.optim.batch_size, config.optim.seed, runs[4].config.optim.seed) == (8, 0, 1)
    assert config.optim.epochs == 2, "the task's flags over the grid's"
    assert (config.optim.learning_rate, runs[2].config.optim.learning_rate) == (1e-2, 1e-3), (
        "the method's for that task over both"
    )


def test_whole_columns_come_first():
    tasks = [run.task.name for run in made.grid().runs()]
    assert tasks == ["Mood"] * 6 + ["Likeness"] * 6


def test_a_part_of_a_grid_is_named_as_people_name_it():
    part = made.grid().only(["mood"], ["lora"])
    assert [run.key for run in part.runs()] == [f"mood/lora-rank-{r}/seed-{s}" for s in (0, 1) for r in made.RANKS]
    with pytest.raises(SpecError, match="the grid has no 'mod'; did you mean 'mood'"):
        made.grid().only(["mod"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title = ", "titel = "), r"grid.toml: the grid has no field 'titel'; did you mean 'title'"),
        (('metric = "accuracy"\n', ""), r"grid.toml: task .Mood \(2\). has no metric; give it, or data = .glue/mrpc."),
        (('name = "LoRA"\n', ""), r"\[\[methods\]\] lacks a field .*name"),
        (("vary = ", "varies = "), r"\[\[methods\]\] has no field 'varies'; did you mean 'vary'"),
        (("seeds = [0, 1]", "seeds = []"), "seeds is empty"),
        (("seeds = [0, 1]", 'seeds = [0]\nstatistic = "medain"'), "unknown statistic 'medain'; did you mean 'median'"),
        (('name = "FT"', 'name = "LoRA"'), "each of another name; got lora, lora"),
        (("[[methods]]", "[[methods]"), r"grid.toml: not TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(tmp_path: Path, change: tuple[str, str], message: str):
    with pytest.raises(SpecError, match=message) as problem:
        read_grid(written(tmp_path, TEXT.replace(*change)))
    assert "\n" not in str(problem.value)


def test_a_run_that_makes_no_sense_is_named_before_any_is_made(tmp_path: Path):
    grid = read_grid(written(tmp_path, TEXT.replace("rank = [1, 4]", "ranc = [1, 4]")))
    with pytest.raises(SpecError, match=r"LoRA, ranc 1, batch size 8 on Mood \(2\): train has no flag 'ranc'; did you"):
        list(grid.runs())
    with pytest.raises(SpecError, match="at least one task"):
        Grid("empty", "tiny", (), made.grid().methods)


def test_a_known_set_says_what_is_left_out():
    task = GridTask("MRPC", data="glue/mrpc", rows=10)
    assert (task.task, task.train_file, task.metric) == ("classification", "set:glue/mrpc:train", "accuracy")
    mismatched = GridTask("MNLI", data="glue/mnli", eval_file="set:glue/mnli:mismatched", metric="mcc")
    assert (mismatched.eval_file, mismatched.metric) == ("set:glue/mnli:mismatched", "mcc")


def test_names_are_files():
    assert slug("Adapter (H), rank 0.5") == "adapter-h-rank-0.5"


@pytest.mark.parametrize("name", presets())
def test_every_packaged_grid_is_one(name: str):
    grid = find_grid(name)
    runs = list(grid.runs())
    assert len({run.key for run in runs}) == len(runs) == len(grid.rows()) * len(grid.tasks) * len(grid.seeds)
    assert grid.notes.strip(), "what its figures are compared with, and what differs"
    columns = {title for task in grid.tasks for title in (task.name, *(f"{task.name} → {ood}" for ood in task.ood))}
    assert {title for _, method in grid.rows() for title in method.published} <= columns
    assert {task for _, method in grid.rows() for task in method.tasks} <= {task.name for task in grid.tasks}


def test_a_grid_that_is_not_there_names_the_nearest(tmp_path: Path):
    with pytest.raises(NotFound, match="no grid 'minilmm'; did you mean 'minilm'"):
        find_grid("minilmm")
    with pytest.raises(NotFound, match=r"no grid .*nowhere.toml"):
        find_grid(str(tmp_path / "nowhere.toml"))


def test_imports_no_torch():
    code = "import sys, bertology_serve.training.grids.grid, bertology_serve.training.grids.grid_tables;"
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr
