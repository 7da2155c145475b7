"""Figure 15: the same tasks on this server and on what one would build instead."""

from __future__ import annotations

from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.stage import Stage
from bertology_serve.bench.serving.alternatives.alternatives_run import Plan, Row, compare, missing

SHARE = 1 / 3


def measure(stage: Stage) -> Measured:
    """Saturated, at equal load, and at rest with many tasks; the alternatives need FastAPI and peft."""
    if absent := missing():
        return Measured(f"not installed: {', '.join(absent)}; pip install 'bertology-serve[bench,cpu]'", False)
    plan = Plan(rounds=stage.rounds, seconds=stage.seconds(3.0, 10.0), different=stage.count(2, 8))
    found = compare(stage, plan)
    ours, peft, pipelines, sessions = found.rows[:4]  # those of float32
    shares = [ours.bytes_many / other.bytes_many for other in (pipelines, sessions)]
    holds = ours.texts_s > peft.texts_s and max(shares) <= SHARE
    words = "; ".join(map(told, found.rows))
    words += f"; memory {shares[0]:.2f} of the pipelines' and {shares[1]:.2f} of the sessions'"
    return Measured(words, holds, found.as_dict())


def told(row: Row) -> str:
    """One server in a few words."""
    return (
        f"{row.name}: {row.texts_s:.0f} texts/s ({row.cpu_ms:.1f} ms CPU each), p50 {row.p50_ms:.0f} and "
        f"p99 {row.p99_ms:.0f} ms, {row.bytes_many / 2**20:.0f} MB"
    )
