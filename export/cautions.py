"""What a user should know before using an export that passed, such as how much of the delta a cast loses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.verify import Report

LOSS = 0.1
"""Share of a delta from which its loss in a cast is worth a warning."""


def cautions(spec: ExportSpec, report: Report) -> tuple[str, ...]:
    """Sentences without a full stop, most important first."""
    found = []
    if spec.neighbours == "anything":
        flips = "" if report.flips is None else f" and {report.flips:.1%} of decisions"
        found.append(
            f"answers depend on the rest of the batch: neighbours changed a row by up to {report.neighbours:.2g}"
            f"{flips}; --precision int8-row does not let them"
        )
    lost = report.lost or {}
    if spec.precision == "fp16" and lost.get("float16", 0.0) > LOSS:
        found.append(f"float16 loses {lost['float16']:.0%} of the delta; leave out --merge, or take --precision fp32")
    later = [kind for kind, share in lost.items() if share > LOSS and (spec.precision, kind) != ("fp16", "float16")]
    if later:
        shares = " and ".join(f"to {kind} {lost[kind]:.0%}" for kind in later)
        found.append(f"a cast of these merged weights loses of the delta: {shares}; leave out --merge if you mean to")
    if report.asked and report.asked != report.provider:
        found.append(f"{report.asked} was asked for, but {report.provider} ran; bertology-serve doctor says why")
    return tuple(found)


HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def lost(base: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> dict[str, float] | None:
    """``‖(cast(W + Δ) - cast(W)) - Δ‖ / ‖Δ‖`` over all weights that a delta changed, by the type cast to.

    ``base`` holds W and ``merged`` W + Δ, by the same names; what ``base`` lacks is zero there. Near zero, the cast
    model still has the delta; at 1, it might as well be the base. ``None`` where nothing changed.
    """
    gone, whole = dict.fromkeys(HALVES, 0.0), 0.0
    for name, after in merged.items():
        before = base.get(name)
        if not after.is_floating_point() or (before is not None and before.data_ptr() == after.data_ptr()):
            continue
        before = torch.zeros_like(after) if before is None else before.detach().to("cpu", torch.float32)
        delta = after.double() - before.double()
        whole += float(delta.square().sum())
        for kind, half in HALVES.items():
            kept = after.to(half).double() - before.to(half).double()
            gone[kind] += float((kept - delta).square().sum())
    return {kind: (part / whole) ** 0.5 for kind, part in gone.items()} if whole else None
