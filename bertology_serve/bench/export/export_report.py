"""What the exporter promises against what was measured, as tables, CSV and a picture."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from bertology_serve.bench.export.export_batches import Batches
from bertology_serve.bench.export.export_contenders import (
    DENSE,
    DENSE_ROW,
    EAGER,
    OLIVE,
    OPTIMUM_O0,
    OPTIMUM_O3,
    UNPADDED,
    UNPADDED_ROW,
)
from bertology_serve.bench.export.export_run import Result
from bertology_serve.bench.export.timing import Timed, ratio

NAME = "export"
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def write(result: Result, directory: Path) -> list[Path]:
    """Writes export.md, export.csv and, with matplotlib, export.png; returns what was written."""
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / f"{NAME}.md", directory / f"{NAME}.csv"]
    files[0].write_text(markdown(result), encoding="utf-8")
    with files[1].open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(_records(result))
    if find_spec("matplotlib") is not None:
        files.append(directory / f"{NAME}.png")
        draw(result, files[-1])
    return files


def markdown(result: Result) -> str:
    """Everything for people."""
    where = result.environment
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    told = [
        f"{where['cpu']}, {where['threads']} of {where['cores']} cores, load {where['load_before']}; {versions}; "
        f"{where['date'][:10]}. Processor time of the process, contenders in turns; × is how many times as fast as "
        "torch eager, the median over rounds of the ratio within each.",
        *(_shown(table) for table in (speeds(result), costs(result), bars(judge(result)))),
        *(f"Missing: {one}." for one in result.missing),
    ]
    return "\n\n".join(told) + "\n"


def speeds(result: Result) -> Table:
    """Milliseconds and × eager of every contender, a column for each kind of batches; bytes of files."""
    names = [timed.name for timed in result.times[result.batches[0].name]]
    columns = [f"{one.name} (fill {one.fill:.2f})" for one in result.batches]
    rows = []
    for name in names:
        cells = [name]
        for one in result.batches:
            timed = next(timed for timed in result.times[one.name] if timed.name == name)
            quick = faster(result, one.name, EAGER, name)
            cells.append(f"{1e3 * median(timed.cpu_seconds):.0f} ms" + (f", {quick:.2f}×" if quick else ""))
        size = result.sizes.get(name, 0)
        rows.append((*cells, f"{size / 1e6:.0f}" if size else "-"))
    return ("contender", *columns, "MB"), rows


def costs(result: Result) -> Table:
    """Metric, decisions, embeddings and neighbours, and the seconds of an export; a dash where it was not measured."""
    metrics = sorted({name for one in result.accuracies.values() for name in one.metrics})
    rows = []
    for name in [name for name in result.sizes if name in result.accuracies or name in result.closenesses]:
        accuracy, close = result.accuracies.get(name), result.closenesses.get(name)
        cells = [f"{accuracy.metrics[one]:.4f}" if accuracy else "-" for one in metrics]
        cells += [f"{accuracy.agreement:.2%}", f"{accuracy.largest:.1e}"] if accuracy else ["-", "-"]
        cells += [f"{close.mean:.5f}", f"{close.worst:.5f}", f"{close.neighbours:.1e}"] if close else ["-"] * 3
        seconds = result.export_seconds.get(name)
        rows.append((name, *cells, "-" if seconds is None else f"{seconds:.2f}"))
    head = ("decisions as torch", "max |Δ logit|", "cosine, mean", "worst", "neighbours change", "export, s")
    return ("contender", *metrics, *head), rows


def bars(found: Sequence[Bar]) -> Table:
    """What was promised, and whether it holds."""
    rows: list[tuple[str, ...]] = [
        (one.name, "-" if one.measured is None else f"{one.measured:.4g}", one.promise, one.verdict) for one in found
    ]
    return ("promise", "measured", "bar", ""), rows


def draw(result: Result, path: Path) -> None:
    """Bars of × eager, a group for each kind of batches."""
    from matplotlib.figure import Figure

    names = [timed.name for timed in result.times[result.batches[0].name]][::-1]
    figure = Figure(figsize=(9, 0.5 * len(names) + 1.2), dpi=150, layout="constrained")
    axis, thick = figure.subplots(), 0.8 / len(result.batches)
    for number, one in enumerate(result.batches):
        widths = [faster(result, one.name, EAGER, name) or 0.0 for name in names]
        places = [place + 0.4 - thick * (number + 0.5) for place in range(len(names))]
        drawn = axis.barh(places, widths, height=thick, label=f"{one.name}, fill {one.fill:.2f}")
        axis.bar_label(drawn, [f"{width:.2f}" for width in widths], fontsize=6, padding=2)
    axis.set_yticks(range(len(names)), names)
    axis.axvline(1.0, color="grey", linewidth=0.8)
    axis.set_xlabel(f"times as fast as torch eager (processor time, {result.environment['threads']} thread)")
    axis.legend(fontsize=7, loc="lower right")
    figure.savefig(path)


def _shown(table: Table) -> str:
    head, rows = table
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows))


def _records(result: Result) -> Iterator[Sequence[object]]:
    """One row a contender, batches and round."""
    where = result.environment
    yield ("batches", "fill", "contender", "round", "ms", "cpu_ms", "date", "cpu", "threads", "onnxruntime")
    told = (where["date"], where["cpu"], where["threads"], where["versions"].get("onnxruntime", ""))
    for one in result.batches:
        for timed in result.times[one.name]:
            for number, (wall, cpu) in enumerate(zip(timed.seconds, timed.cpu_seconds, strict=True)):
                yield (one.name, f"{one.fill:.3f}", timed.name, number, f"{1e3 * wall:.3f}", f"{1e3 * cpu:.3f}", *told)


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
