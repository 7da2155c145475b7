"""Logs as if they had been measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertology_serve.bench.cpu.contenders import ALONE, CONTENDERS, UNPADDED
from bertology_serve.bench.cpu.cpu_log import ANSWERS, EXPORT, HEADER, OPENED, SUITE, TIME, Log

WHERE = {
    "key": "k", "threads": 1, "cpu": "EPYC", "processor": "epyc-25-17", "flags": ["avx2"], "cores": 2,
    "load_before": 0.2, "date": "2026-11-30T02:00:00+00:00", "energy": "no joules",
    "versions": {"bertology-serve": "0.1.0", "torch": "2.13.0"},
}  # fmt: skip


def suite(log: Log, name: str, baseline: str, seconds: Mapping[str, Mapping[str, float]], **answers: Any) -> None:
    """Three turns of every contender on every workload: ``seconds`` by workload and contender."""
    facts = {"sequences": 8, "tokens": 1000, "fill": 0.5}
    log.add(SUITE, suite=name, baseline=baseline, workloads=dict.fromkeys(seconds, facts))
    known = {one.name: one for one in CONTENDERS}
    for contender in {one: None for by in seconds.values() for one in by}:
        side, precision = known[contender].side, known[contender].precision
        log.add(OPENED, suite=name, contender=contender, side=side, precision=precision, bytes=90_000_000, seconds=1.0,
                rss=2**28, versions={"openvino": "2026.4.1"})  # fmt: skip
        log.add(ANSWERS, suite=name, contender=contender, **answers.get(contender, {}))
    for workload, by in seconds.items():
        for turn in range(3):
            for contender, taken in by.items():
                mood = 1 + turn  # which strikes all in a turn
                log.add(TIME, suite=name, workload=workload, contender=contender, turn=turn, cpu=mood * taken,
                        wall=mood * taken, rss=2**29)  # fmt: skip


def alone(path: Path, times: Mapping[str, float], workload: str = "8x128", **answers: Any) -> Log:
    """A log of one model on one workload."""
    log = Log(path)
    log.add(HEADER, **WHERE)
    log.add(EXPORT, contender=UNPADDED, seconds=0.5, same=True)
    suite(log, ALONE, UNPADDED, {workload: times}, **answers)
    return log
