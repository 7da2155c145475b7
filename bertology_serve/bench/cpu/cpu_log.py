"""The log of ``bench cpu``: a JSON object a line, appended as it is measured, so that a run goes on where it ended.

| ``what`` | fields |
|---|---|
| header | ``key`` of the subject, ``threads``, ``processor``, ``flags``, ``load``, ``date``, ``versions``, ``energy`` |
| suite | ``suite``, ``baseline``, ``workloads``: facts by name |
| opened | ``suite``, ``contender``, ``side``, ``precision``, ``seconds``, ``rss``, ``bytes``, ``versions`` |
| answers | ``suite``, ``contender``, ``relative``, and where measured ``neighbours``, ``metrics``, ``cosine`` ... |
| time | ``suite``, ``workload``, ``contender``, ``turn``, ``cpu``, ``wall``, ``rss``, ``joules`` if readable |
| export | ``contender``, ``seconds``, ``same`` |
| missing | ``suite``, ``contender``, ``why`` |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bertology_serve.errors import SpecError

Line = dict[str, Any]
HEADER, SUITE, OPENED, ANSWERS, TIME, EXPORT, MISSING = (
    "header", "suite", "opened", "answers", "time", "export", "missing",
)  # fmt: skip


@dataclass
class Log:
    """Lines of a file, in order; a last line that was cut off is not there."""

    path: Path
    lines: list[Line] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> Log:
        """What the file has; none where it is not there. SpecError where it is no log."""
        found = cls(path)
        texts = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        for number, text in enumerate(texts, 1):
            try:
                found.lines += [json.loads(text)] if text else []
            except json.JSONDecodeError:
                if number < len(texts):
                    raise SpecError(f"{path}:{number} is no JSON; move the file away to begin anew") from None
                found._rewrite()
        return found

    def add(self, what: str, **fields: Any) -> None:
        """One more line, on disk when this returns."""
        line = {"what": what, **fields}
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def forget(self, gone: Callable[[Line], bool]) -> None:
        """Takes lines out."""
        self.lines = [line for line in self.lines if not gone(line)]
        self._rewrite()

    def _rewrite(self) -> None:
        texts = (json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(texts), encoding="utf-8")

    def of(self, what: str, **fields: Any) -> list[Line]:
        """The lines of a kind that have these values."""
        wanted = {"what": what, **fields}.items()
        return [line for line in self.lines if all(name in line and line[name] == value for name, value in wanted)]

    def last(self, what: str, **fields: Any) -> Line:
        """The newest of them, empty where there is none."""
        return (self.of(what, **fields) or [{}])[-1]

    def names(self, suite: str) -> list[str]:
        """The contenders that were timed in a suite, in the order in which they were opened."""
        timed = {line["contender"] for line in self.of(TIME, suite=suite)}
        opened = dict.fromkeys(line["contender"] for line in self.of(OPENED, suite=suite))
        return [name for name in opened if name in timed]

    def seconds(self, suite: str, workload: str, name: str) -> float | None:
        """The median processor time."""
        found = [line["cpu"] for line in self.of(TIME, suite=suite, workload=workload, contender=name)]
        return median(found) if found else None

    def ratio(self, suite: str, workload: str, slow: str, fast: str) -> float | None:
        """How many times as long ``slow`` takes: the median over turns of the ratio within each.

        Of two that share no turn, by way of the baseline, which is in all. ``None`` where one was not timed, or not
        since the baseline was measured anew.
        """
        turns = [
            {line["turn"]: line["cpu"] for line in self.of(TIME, suite=suite, workload=workload, contender=name)}
            for name in (slow, fast)
        ]
        if not all(turns):
            return None
        shared = turns[0].keys() & turns[1].keys()
        if shared:
            return float(median(turns[0][turn] / turns[1][turn] for turn in shared))
        baseline = self.last(SUITE, suite=suite)["baseline"]
        if baseline in (slow, fast):
            return None
        over, under = (self.ratio(suite, workload, name, baseline) for name in (slow, fast))
        return over / under if over and under else None


def logs(directories: Iterable[Path]) -> Sequence[Log]:
    """All logs of some directories, by name."""
    return [Log.open(path) for directory in directories for path in sorted(directory.glob("*.jsonl"))]
