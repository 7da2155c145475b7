"""The kernel benchmark, as far as a machine without a GPU can tell: workloads, arithmetic, reports, refusals."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from bertology_serve.bench.commands import kernels
from bertology_serve.bench.kernels import kernel_plot, kernel_run, methods, row_kernels
from bertology_serve.bench.kernels.gpu_timing import Ceilings, Spread
from bertology_serve.bench.kernels.kernel_report import Figure, floor_ratio, lines, losses, write_csv
from bertology_serve.bench.kernels.workload import LENGTHS, MIXES, NOBODY, Workload, batch_segments, inputs, sweep
from bertology_serve.errors import SpecError, Unsupported, VerificationError
from bertology_serve.kernels import tuning
from bertology_serve.kernels.segments import RowSegment
from bertology_serve.kernels.tuning import Config
from tests.kernels import checks_bench
from tests.kernels.deltas import error
from tests.kernels.interpreting import ROOT, checks, interpreted

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.mark.parametrize("name", checks(checks_bench))
def test_interpreted(name):
    problem = interpreted(checks_bench.__name__)[name]
    assert not problem, problem


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_batches_fill_their_rows_sorted_by_delta(mix, lengths):
    work = Workload(8, 8, 1000, 4, 20, mix, lengths)
    found = batch_segments(work)
    assert found[0].lo == 0
    assert found[-1].hi == 1000
    assert all(a.hi == b.lo and a.first < b.first for a, b in pairwise(found))
    assert all(s.last - s.first == 4 and (s.first - 1) % 4 == 0 for s in found)
    assert (len(found) == 1) == (mix == "single")
    assert batch_segments(work) == found


def test_the_sweep_covers_what_is_promised():
    whole = list(sweep(False))
    assert len(whole) == len(set(whole)) == 8 * 5 * 8 + 15 + 1
    assert {w.deltas for w in whole} == {1, 8, 64, 1000}
    assert {w.rank for w in whole} == {4, 8, 16, 32, 64}
    mixes = {(m, n) for m in MIXES for n in LENGTHS} | {(NOBODY, "lognormal")}
    assert {(w.mix, w.lengths) for w in whole} == mixes
    assert len(list(sweep(True))) == 8


def test_the_floor_is_the_slower_of_operations_and_bytes():
    work = Workload(768, 768, 16384, 16, 1)
    whole = [RowSegment(0, 16384, 1, 17)]
    assert floor_ratio(work, whole, Ceilings(1.0, 1e30)) == pytest.approx(1 + 16 / 768 + 16 / 768)
    moved = 2 * 16384 * 768 + 768 * 768
    assert floor_ratio(work, whole, Ceilings(1e30, 1.0)) == pytest.approx(1 + 16 * 2 * 768 / moved)
    assert floor_ratio(work, [], Ceilings(1.0, 1.0)) == 1.0


def figures() -> list[Figure]:
    work = Workload(768, 768, 1024)
    spread = {
        name: Spread(us - 1, us, us + 1, us - 2) for name, us in (("cublas", 10.0), ("ours", 11.0), ("loop", 10.5))
    }
    return [Figure(work, name, "", time, time.median / 10, 1.05, 1e-3) for name, time in spread.items()]


def test_reports_show_gaps_and_losses(tmp_path):
    printed = lines(figures())
    assert printed[0].split()[-3:] == ["gap", "error", "how"]
    assert "11.0  1.100  1.050  1.048" in printed[2]
    assert losses(figures(), "ours", "cublas") == [
        "slower than loop: K 768, N 768, T 1024, rank 16, 64 deltas: 11.0 against 10.5 us"
    ]
    write_csv(tmp_path / "out.csv", figures(), {"gpu": "some"})
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["us_median"], row["us_warm"], row["gpu"]) for row in rows][1] == (
        "ours", "11.0", "9.0", "some"
    )  # fmt: skip


@pytest.fixture
def timed(monkeypatch):
    """The benchmark with made-up times: each call runs once, on the CPU."""

    def compare(calls, sets):
        for call in calls.values():
            call(sets[0])
        return {name: Spread(1.0, 2.0 + i, 9.0, 1.0) for i, name in enumerate(calls)}

    monkeypatch.setattr(kernel_run, "compare", compare)
    monkeypatch.setattr(kernel_run, "ceilings", lambda device, dtype: Ceilings(1e12, 1e12))
    monkeypatch.setattr(kernel_run, "sets_needed", lambda size, device: 2)
    monkeypatch.setattr(kernel_run, "_plan_time", lambda work, device: (1.0, 2.0))
    monkeypatch.setattr(kernel_run, "machine", lambda device: {"gpu": "none", "date": "today"})


@pytest.mark.usefixtures("timed")
def test_a_measurement_compares_before_it_times(monkeypatch):
    work = Workload(32, 48, 70, 8, 5, dtype="float32")
    [found] = kernel_run.measure([work], CPU)
    assert [f.method for f in found] == ["cublas", "ours", "torch_loop", "merged"]
    assert found[1].ratio == 1.5
    assert found[1].floor > 1.0 == found[0].floor
    assert found[1].error < 1e-6
    monkeypatch.setitem(kernel_run.ALLOWED, "float32", 0.0)
    with pytest.raises(VerificationError, match="against float64 on Workload"):
        list(kernel_run.measure([work], CPU))


@pytest.mark.usefixtures("timed")
def test_a_batch_that_asks_for_no_delta_is_plain():
    [found] = kernel_run.measure([Workload(32, 48, 70, 8, 5, NOBODY, dtype="float32")], CPU)
    assert [f.method for f in found] == ["cublas", "ours", "torch_loop"]
    assert found[1].floor == 1.0
    assert found[1].error < 1e-6


@pytest.mark.parametrize("kernel", ["adapter", "norm"])
def test_row_kernels_are_compared_before_they_are_timed(kernel, monkeypatch):
    times = {"copy": Spread(1, 2, 3, 1), "ours": Spread(2, 3, 4, 2), "torch": Spread(8, 9, 10, 7)}
    monkeypatch.setattr(row_kernels, "sets_needed", lambda size, device: 2)
    monkeypatch.setattr(row_kernels, "compare", lambda calls, sets: {name: times[name] for name in calls})
    work = row_kernels.RowWork(kernel, 70, 32, torch.float32)
    [found] = row_kernels.measure([work], CPU)
    assert found.ratio == 1.5
    assert 0 < found.error < 1e-6
    assert row_kernels.lines([found])[1].split()[:6] == [kernel, "70", "32", "2.0", "3.0", "9.0"]
    monkeypatch.setitem(row_kernels.ALLOWED, torch.float32, 0.0)
    with pytest.raises(VerificationError, match="against float64 on RowWork"):
        list(row_kernels.measure([work], CPU))


def test_the_picture_has_geometric_means(tmp_path):
    work = Workload(768, 768, 16384)
    some = [
        Figure(replace(work, k=k, rows=rows), name, "", Spread(1, 2, 3, 1), ratio, 1.05, 1e-3)
        for k, factor in ((768, 1.0), (3072, 4.0))
        for rows in (1024, 16384)
        for name, ratio in (("cublas", 1.0), ("ours", 1.1 * factor), ("cublas_pair", 1.5))
    ]
    assert kernel_plot.over_rows(some)["ours"] == [(1024, pytest.approx(2.2)), (16384, pytest.approx(2.2))]
    assert kernel_plot.over_deltas(some).keys() == {"ours", "floor", "cublas_pair"}
    kernel_plot.draw(some, {"gpu": "none"}, tmp_path / "ratio.png")
    assert (tmp_path / "ratio.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("timed")
def test_another_implementation_can_stand_beside(monkeypatch):
    monkeypatch.setattr(checks_bench, "theirs", lambda work, segments, device: lambda i: i.x @ i.w.T, raising=False)
    also = f"{checks_bench.__name__}:theirs"
    [found] = kernel_run.measure([Workload(32, 48, 70, 8, 5, dtype="float32")], CPU, also)
    assert found[-1].method == also
    assert found[-1].error > 0.01


@pytest.mark.usefixtures("timed")
def test_tuning_changes_the_rows_that_it_measured(monkeypatch):
    monkeypatch.setattr(kernel_run, "architecture", lambda device: ("sm_80", ""))
    by_torch = kernel_run.LinearPath("torch", Config(), "")
    plain = kernel_run.form
    monkeypatch.setattr(kernel_run, "form", lambda choice, *rest: plain(by_torch, *rest))
    monkeypatch.setattr(kernel_run, "compare", first_is_slow())
    said: list[str] = []
    new = kernel_run.tune(CPU, lambda row: row.point.rows == 128 and row.point.k == row.point.n == 768, said.append)
    assert new.measured == {"gpu": "none", "date": "today", "points": "10 of 400"}
    old = {row.point: row for row in tuning.table("sm_80").rows}
    changed = {row.point for row in new.rows if row != old[row.point]}
    assert len(changed) > 3
    assert {(point.rows, point.k, point.n) for point in changed} == {(128, 768, 768)}
    assert len(said) == 10  # five column classes in two dtypes


def first_is_slow():
    """Times in which "present" takes longest and what was tried first is fastest."""
    taken = {"present": 9.0, "torch": 8.0}
    return lambda calls, sets: {name: Spread(1.0, taken.setdefault(name, 2.0), 1.0, 1.0) for name in calls}


def test_candidates_begin_with_what_stands():
    row = tuning.table("sm_90").nearest(tuning.Point("half", 768, 768, 1, 4096, 16))
    tried = list(kernel_run.candidates(row, True))
    assert (tried[0].form, tried[0].config) == (row.form, row.config)
    assert {choice.form for choice in tried} == {"fused", "split", "torch"}
    assert all(choice.config.rank_tile == 16 for choice in tried)


@NO_GPU
def test_without_a_gpu_it_says_so():
    with pytest.raises(Unsupported, match=r"^no CUDA GPU: "):
        kernels(quick=True)


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(SpecError, match="--dtype float8"):
        kernels(dtype="float8")
    with pytest.raises(SpecError, match="'12k', expected a number"):
        kernels(rows="12k")


@NO_GPU
def test_the_command_needs_torch_triton_and_typer_alone():
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('transformers', 'safetensors', 'onnx', 'starlette', 'peft'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import typer\n"
        "from bertology_serve.bench.commands import kernels\n"
        "app = typer.Typer(); app.command()(kernels)\n"
        "app(['--quick'])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "no CUDA GPU" in run.stderr


@pytest.mark.skipif(methods._grouped() is None, reason="this torch has no grouped_mm")
def test_grouped_mm_computes_the_same_linear():
    work = Workload(64, 96, 200, 8, 5)
    found = batch_segments(work)
    given = inputs(work, CPU, 0)
    got = methods.grouped(found, CPU)(given)
    assert error(got, methods.exact(given, found, 200)) < 4e-3
