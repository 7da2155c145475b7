"""``bertology-serve bench kernels``: needs torch, triton and typer alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bertology_serve.cli.common import load_library, note
from bertology_serve.errors import SpecError


def kernels(
    quick: Annotated[bool, typer.Option("--quick", help="Eight points instead of the whole sweep.")] = False,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write every figure there.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the ratios over T and deltas (PNG).")] = None,
    shapes: Annotated[str, typer.Option("--shapes", help="Only these, such as 768x768,768x3072 (K x N).")] = "",
    rows: Annotated[str, typer.Option("--rows", help="Only these T, such as 4096,16384.")] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    tune: Annotated[Path | None, typer.Option("--tune", help="Search configurations; write a table.")] = None,
    also: Annotated[str, typer.Option("--also", help="One more method, MODULE:FUNCTION; see bench_methods.")] = "",
) -> None:
    """Measure the kernels against cuBLAS and the ways that others take, on this machine's GPU.

    Prints time, ratio to cuBLAS alone, the floor under that ratio and the gap, losses included; then adapters and
    norms beside a copy of their rows. Without a CUDA GPU it says so and exits with 2.
    """
    sizes = [_shape(text) for text in _listed(shapes)]
    heights = [_number(text) for text in _listed(rows)]
    if dtype not in ("bfloat16", "float16", "float32"):
        raise SpecError(f"got --dtype {dtype}, expected bfloat16, float16 or float32")
    load_library()
    from bertology_serve.bench.kernels import kernel_plot, kernel_run

    device = kernel_run.cuda()
    kernel_plot.check(plot)
    if tune is not None:
        table = kernel_run.tune(
            device,
            lambda row: (
                (not sizes or (row.point.k, row.point.n) in sizes) and (not heights or row.point.rows in heights)
            ),
            note,
        )
        table.save(tune)
        note(f"wrote {tune}; commit it as kernels/tuning.{table.arch}.json")
        return
    _sweep(quick, csv, plot, sizes, heights, dtype, also)


def _sweep(
    quick: bool,
    csv: Path | None,
    plot: Path | None,
    sizes: list[tuple[int, int]],
    heights: list[int],
    dtype: str,
    also: str,
) -> None:
    import torch

    from bertology_serve.bench.kernels import kernel_plot, kernel_report, kernel_run, row_kernels
    from bertology_serve.bench.kernels.gpu_timing import machine
    from bertology_serve.bench.kernels.methods import BASELINE, OURS
    from bertology_serve.bench.kernels.workload import sweep

    device = kernel_run.cuda()
    about = machine(device)
    note(", ".join(f"{key} {value}" for key, value in about.items()))
    wanted = [
        w for w in sweep(quick, dtype) if (not sizes or (w.k, w.n) in sizes) and (not heights or w.rows in heights)
    ]
    if not wanted:
        raise SpecError("no point of the sweep has those --shapes and --rows; run with --quick to see some that it has")
    figures = []
    for found in kernel_run.measure(wanted, device, also):
        figures += found
        note(f"{len(figures)} figures: {found[0].workload}")
        if csv is not None:
            kernel_report.write_csv(csv, figures, about)
    print("\n".join([*kernel_report.lines(figures), *kernel_report.losses(figures, OURS, BASELINE)]))
    if plot is not None:
        kernel_plot.draw(figures, about, plot)
    if not sizes and not heights:
        print("\n".join(row_kernels.lines(row_kernels.measure(row_kernels.sweep(getattr(torch, dtype)), device))))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _shape(text: str) -> tuple[int, int]:
    k, _, n = text.partition("x")
    return _number(k), _number(n)


def _number(text: str) -> int:
    if not text.isdigit():
        raise SpecError(f"got {text!r}, expected a number; write --shapes 768x3072 --rows 4096,16384")
    return int(text)
