"""A benchmark's result: times, bars, and what they were measured on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bertology_serve.bench.serving.texts_workload import Workload
from bertology_serve.bench.timing import Timed, ratio
from bertology_serve.errors import SpecError


@dataclass(frozen=True)
class Bar:
    """A promise about a ratio of two contenders: at least, or at most, so much."""

    name: str
    slow: str
    fast: str
    least: float | None = None
    most: float | None = None

    @property
    def promise(self) -> str:
        """``≥ 8×`` or ``≤ 1.10×``."""
        return f"≥ {self.least:g}×" if self.least is not None else f"≤ {self.most:.2f}×"

    def holds(self, measured: float) -> bool:
        """Whether the measured ratio keeps the promise."""
        return (self.least is None or measured >= self.least) and (self.most is None or measured <= self.most)


BARS = (
    Bar("peft as it arrives ÷ ours", "peft, as it arrives", "ours", least=8.0),
    Bar("peft sorted in 16s ÷ ours", "peft, sorted in 16s", "ours", least=3.0),
    Bar("ours ÷ ours without deltas", "ours", "ours, no delta", most=1.10),
)


@dataclass(frozen=True)
class Judged:
    """A bar with the ratio measured, and that of CPU seconds; ``None`` where one of its contenders did not run."""

    bar: Bar
    measured: float | None
    cpu: float | None

    @property
    def verdict(self) -> str:
        """``holds``, ``missed`` or ``not run``."""
        return "not run" if self.measured is None else "holds" if self.bar.holds(self.measured) else "missed"


def judge(times: Sequence[Timed], bars: Sequence[Bar] = BARS) -> list[Judged]:
    """Every bar against the measured times."""
    known = {timed.name: timed for timed in times}
    found = []
    for bar in bars:
        if {bar.slow, bar.fast} <= known.keys():
            pair = known[bar.slow], known[bar.fast]
            found.append(Judged(bar, ratio(*pair), ratio(*pair, cpu=True)))
        else:
            found.append(Judged(bar, None, None))
    return found


def as_dict(
    work: Workload, backbone: str, tokens: int, times: Sequence[Timed], judged: Sequence[Judged], where: dict[str, Any]
) -> dict[str, Any]:
    """The whole result, ready for JSON."""
    return {
        "benchmark": "serving",
        "backbone": backbone,
        "workload": {**asdict(work), "tokens": tokens},
        "environment": where,
        "contenders": [
            {
                "name": timed.name,
                "median_ms": 1e3 * timed.median,
                "rounds_ms": [1e3 * second for second in timed.seconds],
                "rounds_cpu_ms": [1e3 * second for second in timed.cpu_seconds],
            }
            for timed in times
        ],
        "bars": [
            {
                "name": one.bar.name,
                "promise": one.bar.promise,
                "measured": one.measured,
                "measured_cpu": one.cpu,
                "verdict": one.verdict,
            }
            for one in judged
        ],
    }


def check_suffix(path: Path | None) -> None:
    """SpecError for a file that ``write`` does not know how to write; before the work, not after it."""
    if path is not None and path.suffix not in (".json", ".csv"):
        raise SpecError(f"cannot write {path}: expected a name that ends in .json or .csv")


def write(result: dict[str, Any], path: Path) -> None:
    """Writes ``.json`` (everything) or ``.csv`` (one row per contender and round)."""
    check_suffix(path)
    text = json.dumps(result, indent=1) + "\n" if path.suffix == ".json" else _csv(result)
    path.write_text(text, encoding="utf-8")


def _csv(result: dict[str, Any]) -> str:
    where, text = result["environment"], io.StringIO()
    fixed = [where["date"], where["cpu"], where["threads"], where["versions"]["torch"]]
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["contender", "round", "ms", "cpu_ms", "date", "cpu", "threads", "torch"])
    for contender in result["contenders"]:
        pairs = zip(contender["rounds_ms"], contender["rounds_cpu_ms"], strict=True)
        for number, (wall, cpu) in enumerate(pairs):
            rows.writerow([contender["name"], number, f"{wall:.3f}", f"{cpu:.3f}", *fixed])
    return text.getvalue()
