from __future__ import annotations

import csv
import statistics
from io import StringIO

import pytest

from bertology_serve.training.grids.grid_tables import figures, long_csv, markdown, wide_csv
from tests.training.grids import made

FOUND = {
    "mood/ft/seed-0": made.result(0.9, 0.5, delta_parameters=12345),
    "mood/ft/seed-1": made.result(0.8, 0.7, delta_parameters=12345),
    "likeness/ft/seed-0": made.result(0.5, metric="spearman", seconds=30.0),
    "likeness/ft/seed-1": made.result(0.7, metric="spearman", seconds=50.0),
    "mood/lora-rank-4/seed-1": made.result(0.61, 0.6),
}


def test_cells_are_the_statistic_and_its_deviation_beside_the_published_figure():
    lines = figures(made.results(made.grid(statistic="mean"), FOUND)).splitlines()
    assert lines[0] == "| method | parameters | Mood | Mood → far | Likeness | mean |"
    spread = statistics.stdev([90.0, 80.0])
    assert lines[2] == (
        f"| FT | 12,345 (125.0M) | 85.0 ± {spread:.1f} (90.2) | 60.0 ± 14.1 (70.0) | 60.0 ± 14.1 (80.0) | 72.5 (85.1) |"
    )
    assert lines[3] == "| LoRA, rank 1 | – | – (91.0) | – | – | – |"
    assert lines[4] == "| LoRA, rank 4 | 100 | 61.0 (1 of 2 seeds) (91.0) | 60.0 (1 of 2 seeds) | – | – |"


def test_median_is_the_middle_seed():
    found = {f"mood/ft/seed-{seed}": made.result(value) for seed, value in enumerate((0.9, 0.1, 0.8))}
    grid = made.grid(seeds=(0, 1, 2)).only(["mood"], ["ft"])
    cell = made.results(grid, found)
    assert cell.cell("FT", cell.columns[0]).middle == pytest.approx(80.0)


def test_document_says_costs_and_what_is_missing():
    text = markdown(made.results(made.grid(notes="Noted."), FOUND))
    assert "Runs that are missing: Mood 3 of 6, Likeness 4 of 6." in text
    assert "| FT | 20 | 1,000 | 3 | 0.00 |" in text, "the median of 10, 10, 30 and 50 seconds"
    assert "Median ± standard deviation of 2 seeds, in percent: Mood accuracy, Likeness spearman." in text
    assert "Training rows: Mood 12 (measured on: own 7, far 7); Likeness 12 (measured on: own 7). CPU; torch" in text
    assert "Noted." in text


def test_costs_are_of_whole_tasks_where_there_is_one():
    rows = ("ft", "lora-rank-1", "lora-rank-4")
    found = {f"mood/{row}/seed-{seed}": made.result(0.5, 0.5, seconds=4.0) for row in rows for seed in (0, 1)}
    text = markdown(made.results(made.grid(), {**found, "likeness/ft/seed-0": FOUND["likeness/ft/seed-0"]}))
    assert "Medians over the runs on Mood;" in text
    assert "| FT | 4 |" in text


def test_a_task_that_has_not_begun_has_no_column():
    text = markdown(made.results(made.grid(), {"mood/ft/seed-0": FOUND["mood/ft/seed-0"]}))
    assert "| method | parameters | Mood | Mood → far | mean |" in text
    assert "in percent: Mood accuracy. " in text
    assert "Likeness 6 of 6." in text


def test_an_empty_grid_is_a_table_too():
    text = markdown(made.results(made.grid(), {}))
    assert "| FT | – (125.0M) | – (90.2) |" in text
    assert "Training rows: none yet." in text


def test_csv_holds_the_same_figures():
    results = made.results(made.grid(statistic="mean"), FOUND)
    wide = list(csv.DictReader(StringIO(wide_csv(results))))
    assert (wide[0]["Mood mean"], wide[0]["Mood seeds"], wide[0]["Mood published"]) == ("85.0", "2", "90.2")
    assert (wide[1]["Mood mean"], wide[2]["Mood std"]) == ("", "")
    long = list(csv.DictReader(StringIO(long_csv(results))))
    assert len(long) == 8
    lora = next(row for row in long if row["method"] == "LoRA" and row["ood"] == "far")
    assert (lora["rank"], lora["seed"], lora["value"], lora["delta_parameters"]) == ("4", "1", "0.6", "100")
