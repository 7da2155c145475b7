"""Every method of the benchmark computes the same linear."""

from __future__ import annotations

import torch

from bertology_serve.bench.kernels.methods import exact, form, methods, pair, plain
from bertology_serve.bench.kernels.workload import Workload, batch_segments, inputs
from bertology_serve.kernels.dispatch import LinearPath
from bertology_serve.kernels.tuning import FUSED, SPLIT, Config
from tests.kernels.deltas import Setting, error

WORKLOAD = Workload(32, 48, 70, 8, 5, lengths="16")
CONFIG = Config(16, 16, 32, 16, 1)


def check_every_method_is_right(setting: Setting) -> None:
    work = Workload(**vars(WORKLOAD) | {"dtype": str(setting.dtype).removeprefix("torch.")})
    device = torch.device(setting.device)
    segments = batch_segments(work)
    given = inputs(work, device, 0)
    want = exact(given, segments, work.rows)
    calls = methods(work, segments, device) | {
        "fused": form(LinearPath(FUSED, CONFIG, ""), work, segments, device),
        "split": form(LinearPath(SPLIT, CONFIG, ""), work, segments, device),
        "pair": pair(work, segments, device),
    }
    base = calls.pop("cublas")(given)
    for name, call in calls.items():
        if name != "own_base":
            found = error(call(given), want)
            assert found <= 3 * setting.tolerance, f"{name}: {found:.1e}"
    assert error(plain(CONFIG)(given), base) <= 3 * setting.tolerance
    assert error(base, want) > 0.01  # the deltas do matter
