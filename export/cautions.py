"""What a user should know before using an export that passed."""

from __future__ import annotations

from bertology_serve.export.spec import ExportSpec
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
