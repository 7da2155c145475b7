"""The committed tables: complete, consistent, and by rule until a GPU has measured them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bertology_serve.kernels import tuning
from bertology_serve.kernels.tuning import FUSED, SPLIT, TORCH, Point, rank_tile

ARCHITECTURES = ("sm_80", "sm_90")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_committed_table_has_every_point(arch):
    table = tuning.table(arch)
    assert table.arch == arch
    assert {row.point for row in table.rows} == set(tuning.points())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_table_that_was_not_measured_is_what_the_rules_give(arch):
    table = tuning.table(arch)
    if table.measured:
        assert table.measured.keys() >= {"gpu", "driver", "torch", "triton", "date"}
    else:
        assert table == tuning.by_rules(arch)


def test_the_rules_follow_the_roofline():
    rows = {row.point: row for row in tuning.by_rules("sm_90").rows}
    point = Point("half", 768, 768, 1, 16384, 16)
    few = rows[replace(point, rows=128)]
    assert rows[point].form == SPLIT
    assert rows[point].config.persistent  # many rows: a program hides one tile's end behind the next one's start
    assert (few.form, few.config.persistent) == (FUSED, False)  # few rows: more programs, one launch
    assert rows[replace(point, columns=0)].form == TORCH
    assert rows[replace(point, columns=128)].form == SPLIT
    assert rows[replace(point, k=1024, n=4096, columns=64)].form == SPLIT
    assert [rank_tile(n) for n in (1, 16, 17, 33, 64, 65)] == [16, 16, 32, 64, 64, 64]


def test_the_nearest_row_is_nearest_in_powers_of_two():
    table = tuning.table("sm_90")
    near = table.nearest(Point("half", 384, 1536, 1, 5000, 9)).point
    assert near == Point("half", 768, 2304, 1, 4096, 16)
    assert table.nearest(Point("half", 768, 768, 1, 4096, 0)).point.columns == 0
    with pytest.raises(ValueError, match="has no row for; write one with --tune"):
        table.nearest(Point("half", 768, 1536, 2, 4096, 16))


def test_tables_survive_the_file(tmp_path):
    table = replace(tuning.by_rules("sm_80"), measured={"gpu": "some", "date": "some day"})
    table.save(tmp_path / "t.json")
    assert tuning.read(tmp_path / "t.json") == table
    data = json.loads((tmp_path / "t.json").read_text())
    data["rows"][3][6] = "magic"
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"t.json, row 3: got .*'magic'"):
        tuning.read(tmp_path / "t.json")
    data["keys"][0] = "other"
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="write it again with --tune"):
        tuning.read(tmp_path / "t.json")
