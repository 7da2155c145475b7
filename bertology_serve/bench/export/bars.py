"""What the exporter promises, against what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bertology_serve.bench.export.export_batches import Batches
from bertology_serve.bench.export.export_contenders import DENSE, DENSE_ROW, EAGER, UNPADDED, UNPADDED_ROW
from bertology_serve.bench.export.export_run import Result
from bertology_serve.bench.export.others import OLIVE, OPTIMUM_O0, OPTIMUM_O3
from bertology_serve.bench.export.timing import Timed, ratio

SPARSE = 0.4
"""The fill up to which unpadding must pay."""


@dataclass(frozen=True)
class Bar:
    """``measured`` must be at least or at most so much; ``None`` where it was not measured."""

    name: str
    measured: float | None
    least: float | None = None
    most: float | None = None

    @property
    def promise(self) -> str:
        """``≥ 2.2`` or ``≤ 2``."""
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"

    @property
    def verdict(self) -> str:
        """``holds``, ``missed`` or ``not measured``."""
        if self.measured is None:
            return "not measured"
        holds = (self.least is None or self.measured >= self.least) and (
            self.most is None or self.measured <= self.most
        )
        return "holds" if holds else "missed"


def judge(result: Result) -> list[Bar]:
    """Every bar, in the order of the issue: speed, then accuracy, then the export itself."""
    return [*_speed(result), *_accuracy(result), *_export(result)]


def faster(result: Result, batches: str, slow: str, fast: str) -> float | None:
    """How many times as fast, of processor time; ``None`` where one of the two was not timed."""
    times: dict[str, Timed] = {timed.name: timed for timed in result.times[batches]}
    return ratio(times[slow], times[fast], cpu=True) if {slow, fast} <= times.keys() else None


def _speed(result: Result) -> Iterator[Bar]:
    at = result.batches[0].name
    for other, least in ((OPTIMUM_O0, 1.0), (OPTIMUM_O3, 1.1), (OLIVE, 1.2)):
        yield Bar(f"dense against {other}, {at}", faster(result, at, other, DENSE), least=least)
    sparse = _sparsest(result)
    if sparse is not None:
        yield Bar(_filled("unpadded against dense", sparse), faster(result, sparse.name, DENSE, UNPADDED), least=2.2)
    yield Bar(f"unpadded against dense, {at}", faster(result, at, DENSE, UNPADDED), least=0.95)
    yield Bar(f"dense int8-row against fp32, {at}", faster(result, at, DENSE, DENSE_ROW), least=2.0)
    if sparse is not None:
        measured = faster(result, sparse.name, UNPADDED, UNPADDED_ROW)
        yield Bar(_filled("unpadded int8-row against fp32", sparse), measured, least=1.65)


def _accuracy(result: Result) -> Iterator[Bar]:
    row = [result.closenesses[name] for name in (DENSE_ROW, UNPADDED_ROW)]
    yield Bar("int8-row, cosine of embeddings", min(one.mean for one in row), least=0.997)
    yield Bar("int8-row, change of a row by its neighbours", max(one.neighbours for one in row), most=0.0)
    exact, found = (result.accuracies.get(name) for name in (EAGER, UNPADDED_ROW))
    if exact is not None and found is not None:
        for metric, value in exact.metrics.items():
            points = 100 * abs(found.metrics[metric] - value)
            yield Bar(f"int8-row, change of {metric} in points", points, most=0.5)


def _export(result: Result) -> Iterator[Bar]:
    yield Bar("export without verification, seconds", max(result.export_seconds.values()), most=2.0)
    yield Bar(
        "forms whose bytes differ between exports", float(sum(not one for one in result.same_bytes.values())), most=0
    )


def _sparsest(result: Result) -> Batches | None:
    """The emptiest batches, where they are empty enough for the promise."""
    found = min(result.batches, key=lambda one: one.fill)
    return found if found.fill <= SPARSE else None


def _filled(what: str, batches: Batches) -> str:
    return f"{what}, {batches.name} (fill {batches.fill:.2f})"
