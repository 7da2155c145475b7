"""Tables, bars, CSV and pictures of ``bench cpu``, all from its log: nothing is measured here."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bertology_serve.bench.cpu.contenders import (
    ALONE,
    ARRANGED,
    ARRIVES,
    BITFIT8,
    DENSE,
    DENSE_ROW,
    EAGER,
    ENGINE,
    KINDS8,
    LEFT_OUT,
    LORA8,
    LORA32,
    NO_DELTA,
    OLIVE,
    ONNX_ENGINE,
    OPTIMUM_O0,
    OPTIMUM_O3,
    UNPADDED,
    UNPADDED_ROW,
)
from bertology_serve.bench.cpu.cpu_log import ANSWERS, EXPORT, HEADER, MISSING, OPENED, SUITE, TIME, Line, Log, logs
from bertology_serve.bench.cpu.subject import MIX

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
MEGA = 2**20
POINTS, COSINE = 0.005, 0.995
"""What a form may lose of the task's first metric, and of the cosine, before its speed is not compared."""
FULL, IDLE = "8x128", 0.5


def header(log: Log) -> str:
    """Where and when it was measured, and how to read it."""
    where = log.last(HEADER)
    starts = log.of(HEADER)
    busy = max(line["load_before"] for line in starts)
    versions = dict[str, str]()
    for line in log.of(OPENED):
        versions |= {name: version for name, version in line["versions"].items() if name not in ("python", "numpy")}
    versions |= {name: version for name, version in where["versions"].items() if name == "bertology-serve"}
    told = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    dates = sorted({line["date"][:10] for line in starts})
    flags = ", ".join(where["flags"]) or "no flags that matter"
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    mood = f"busy machine (load {busy})" if busy > IDLE else f"load {busy}"
    return (
        f"{where['cpu']} ({where['processor']}; {flags}), {where['threads']} of {where['cores']} cores, {when}, {mood}"
        f"; {where['energy']}. {told} (newest where several)."
    )


def contenders(log: Log, suite: str) -> list[Line]:
    """Of each that was timed the newest ``opened``, by precision, in the order of the log."""
    found = [log.last(OPENED, suite=suite, contender=name) for name in log.names(suite)]
    return sorted((one for one in found if one), key=lambda one: ("fp32", "16 bits", "8 bits").index(one["precision"]))


def workloads(log: Log, suite: str) -> list[str]:
    """The workloads of a suite that somebody was timed on."""
    return [name for name in log.last(SUITE, suite=suite)["workloads"] if log.of(TIME, suite=suite, workload=name)]


def suites(log: Log) -> list[str]:
    """The suites in which somebody was timed."""
    return [name for name in dict.fromkeys(line["suite"] for line in log.of(SUITE)) if log.names(name)]


def speeds(log: Log, suite: str) -> Table:
    """Tokens a second and × the baseline's time of every contender, a column for each workload."""
    told, rows = log.last(SUITE, suite=suite), []
    columns = workloads(log, suite)
    for one in contenders(log, suite):
        cells = [one["contender"], one["precision"]]
        for name in columns:
            seconds = log.seconds(suite, name, one["contender"])
            slow = log.ratio(suite, name, one["contender"], told["baseline"])
            rate = f"{told['workloads'][name]['tokens'] / seconds:,.0f}" if seconds else "-"
            cells.append(f"{slow:.2f} ({rate})" if slow else "-" if seconds is None else f"({rate})")
        rows.append(tuple(cells))
    filled = [f"{name} (fill {told['workloads'][name]['fill']:.2f})" for name in columns]
    return ("contender", "", *filled), rows


def costs(log: Log, suite: str) -> Table:
    """Memory, size of files, metric, decisions, cosine and neighbours; a dash where it was not measured."""
    metrics = sorted({name for line in log.of(ANSWERS, suite=suite) for name in line.get("metrics", {})})
    rows = []
    for one in contenders(log, suite):
        name = one["contender"]
        answers, export = log.last(ANSWERS, suite=suite, contender=name), log.last(EXPORT, contender=name)
        most = max(line["rss"] for line in log.of(TIME, suite=suite, contender=name))
        cells = [f"{one['rss'] / MEGA:.0f}", f"{most / MEGA:.0f}", f"{one['bytes'] / 1e6:.0f}" if one["bytes"] else "-"]
        cells += [shown(answers.get("metrics", {}).get(metric), ".4f") for metric in metrics]
        cells += [shown(answers.get(key), how) for key, how in ANSWERED]
        rows.append((name, *cells, shown(export.get("seconds"), ".2f")))
    head = ("MB loaded", "MB most", "file, MB", *metrics, "decisions as torch", "‖Δ‖/‖torch‖", "cosine, mean", "worst",
            "neighbours change", "export, s")  # fmt: skip
    return ("contender", *head), rows


ANSWERED = (("agreement", ".2%"), ("relative", ".1e"), ("cosine", ".5f"), ("worst", ".5f"), ("neighbours", ".1e"))


def shown(value: float | None, how: str) -> str:
    """A number for people."""
    return "-" if value is None else format(value, how)


@dataclass(frozen=True)
class Bar:
    """``measured`` must be at least or at most so much; ``None`` where it was not measured. ``of`` says of whom."""

    name: str
    measured: float | None
    least: float | None = None
    most: float | None = None
    of: str = ""

    @property
    def promise(self) -> str:
        """``≥ 2.2`` or ``≤ 2``."""
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"

    @property
    def verdict(self) -> str:
        """``holds``, ``missed`` or ``not measured``."""
        if self.measured is None:
            return "not measured"
        low, high = self.least or 0.0, float("inf") if self.most is None else self.most
        return "holds" if low <= self.measured <= high else "missed"


def judge(log: Log) -> list[Bar]:
    """Every bar: beside others, many deltas beside one, our forms beside each other, accuracy, the export itself."""
    return [*_beside_others(log), *_mixed(log), *_forms(log), *_accuracy(log), *_exports(log)]


def _beside_others(log: Log) -> Iterator[Bar]:
    """On each workload the fastest of all others ÷ the fastest of ours, in each precision."""
    for precision in ("fp32", "16 bits", "8 bits"):
        for workload in workloads(log, ALONE) if ALONE in suites(log) else ():
            ours, theirs = (_fastest(log, workload, side, precision) for side in ("ours", "theirs"))
            measured = log.ratio(ALONE, workload, theirs, ours) if ours and theirs else None
            least = 1.5 if (precision, workload) == ("8 bits", MIX) else 1.0
            yield Bar(
                f"others ÷ ours, {precision}, {workload}",
                measured,
                least=least,
                of=f"{theirs} ÷ {ours}" if measured else "",
            )


def _fastest(log: Log, workload: str, side: str, precision: str) -> str | None:
    """Of those that are as accurate as asked for."""
    exact = log.last(ANSWERS, suite=ALONE, contender=EAGER).get("metrics", {})
    found = dict[str, float]()
    for one in contenders(log, ALONE):
        name = one["contender"]
        slow = log.ratio(ALONE, workload, name, log.last(SUITE, suite=ALONE)["baseline"])
        answers = log.last(ANSWERS, suite=ALONE, contender=name)
        metric = next(iter(answers.get("metrics", {})), "")
        lost = exact[metric] - answers["metrics"][metric] if metric in exact else 0.0
        close = answers.get("cosine", 1.0) >= COSINE and lost <= POINTS
        if slow is not None and (one["side"], one["precision"]) == (side, precision) and close:
            found[name] = slow
    return min(found, key=found.__getitem__, default=None)


def _mixed(log: Log) -> Iterator[Bar]:
    row = f"{ONNX_ENGINE}, int8-row"
    for suite, engines in (
        (LORA8, ((ENGINE, 1.05), (ONNX_ENGINE, 1.05), (row, 1.08))),
        *((suite, ((ENGINE, 1.1), (ONNX_ENGINE, 1.1), (row, 1.1))) for suite in (KINDS8, BITFIT8, LORA32)),
    ):
        for name, most in engines if suite in suites(log) else ():
            yield Bar(f"{suite} ÷ none, {name}", log.ratio(suite, suite, name, name + NO_DELTA), most=most)
    for other, bits, least in (
        (ARRIVES, "fp32", 9),
        (ARRANGED, "fp32", 3),
        (ARRIVES, "8 bits", 20),
        (ARRANGED, "8 bits", 6),
    ):
        if LORA8 in suites(log):
            ours = [
                one["contender"] for one in contenders(log, LORA8) if (one["side"], one["precision"]) == ("ours", bits)
            ]
            ratios = (log.ratio(LORA8, LORA8, other, name) for name in ours if not name.endswith(NO_DELTA))
            found = [ratio for ratio in ratios if ratio is not None]
            yield Bar(f"{other} ÷ ours, {bits}", max(found, default=None), least=least)


FORMS_BARS = (
    ("dense against optimum O0", FULL, OPTIMUM_O0, DENSE, 1.0),
    ("dense against optimum O3", FULL, OPTIMUM_O3, DENSE, 1.1),
    ("dense against Olive", FULL, OLIVE, DENSE, 1.2),
    ("unpadded against dense", MIX, DENSE, UNPADDED, 2.2),
    ("unpadded against dense", FULL, DENSE, UNPADDED, 0.95),
    ("dense int8-row against fp32", FULL, DENSE, DENSE_ROW, 2.0),
    ("unpadded int8-row against fp32", MIX, UNPADDED, UNPADDED_ROW, 1.65),
)
"""Name, workload, slow, fast, and how many times as fast at least."""


def _forms(log: Log) -> Iterator[Bar]:
    if ALONE in suites(log):
        for name, workload, slow, fast, least in FORMS_BARS:
            yield Bar(f"{name}, {workload}", log.ratio(ALONE, workload, slow, fast), least=least)
        yield Bar(f"exported graph ÷ torch engine, {MIX}", log.ratio(ALONE, MIX, UNPADDED, ENGINE), most=1.15)


def _accuracy(log: Log) -> Iterator[Bar]:
    row = [log.last(ANSWERS, suite=ALONE, contender=name) for name in (DENSE_ROW, UNPADDED_ROW)]

    def of(key: str, worst: Callable[[Sequence[float]], float]) -> float | None:
        found = [line[key] for line in row if key in line]
        return worst(found) if found else None

    yield Bar("int8-row, cosine of embeddings", of("cosine", min), least=0.997)
    yield Bar("int8-row, change of a row by its neighbours", of("neighbours", max), most=0.0)
    exact = log.last(ANSWERS, suite=ALONE, contender=EAGER).get("metrics", {})
    for metric, value in row[1].get("metrics", {}).items() if exact else ():
        yield Bar(f"int8-row, change of {metric} in points", 100 * abs(value - exact[metric]), most=0.5)


def _exports(log: Log) -> Iterator[Bar]:
    newest = {line["contender"]: line for line in log.of(EXPORT)}.values()
    if newest:
        yield Bar("export without verification, seconds", max(line["seconds"] for line in newest), most=2.0)
        yield Bar("forms whose bytes differ between exports", float(sum(not line["same"] for line in newest)), most=0)


def bars(found: Sequence[Bar]) -> Table:
    """What was promised, and whether it holds."""
    rows: list[tuple[str, ...]] = [
        (one.name, shown(one.measured, ".4g"), one.promise, one.verdict, one.of) for one in found
    ]
    return ("promise", "measured", "bar", "", "of"), rows


def missing(log: Log) -> list[str]:
    """Who did not take part and was not timed before, and why."""
    names = dict[str, list[str]]()
    for line in log.of(MISSING):
        if line["contender"] not in log.names(line["suite"]):
            names.setdefault(line["why"], []).append(line["contender"])
    told = [f"{', '.join(dict.fromkeys(found))}: {why}" for why, found in names.items()]
    return [*told, *(f"{name}: {why}" for name, why in LEFT_OUT.items())]


def tables(log: Log) -> Iterator[tuple[str, Table]]:
    """All tables with their titles."""
    for suite in suites(log):
        told = log.last(SUITE, suite=suite)
        yield f"{suite}: processor time ÷ that of {told['baseline']} (tokens a second)", speeds(log, suite)
    for suite in suites(log):
        yield f"{suite}: memory and accuracy", costs(log, suite)
    yield "bars", bars(judge(log))


def write(log: Log) -> list[Path]:
    """Writes .md, .csv and, with matplotlib, .png beside the log; returns them."""
    files = [log.path.with_suffix(end) for end in (".md", ".csv")]
    parts = [f"# {log.path.stem}", header(log)]
    parts += [f"## {title}\n\n{markdown(table)}" for title, table in tables(log)]
    parts += [f"Missing: {one}." for one in missing(log)]
    files[0].write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    with files[1].open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(_records(log))
    if find_spec("matplotlib") is not None and ALONE in suites(log):
        files.append(log.path.with_suffix(".png"))
        draw(log, files[-1])
    return files


def index(output: Path) -> Path:
    """Writes index.md: the bars of all processors beside each other, a column for each log."""
    found = logs(path for path in sorted(output.iterdir()) if path.is_dir())
    judged = [{one.name: one for one in judge(log)} for log in found]
    names = list(dict.fromkeys(name for one in judged for name in one))
    rows = []
    for name in names:
        cells = [shown(one[name].measured, ".3g") if name in one else "-" for one in judged]
        rows.append((name, next(one[name].promise for one in judged if name in one), *cells))
    places = [f"[{log.path.stem}]({log.path.parent.name}/{log.path.stem}.md), {log.path.parent.name}" for log in found]
    parts = ["# CPUs beside each other", markdown((("promise", "bar", *places), rows))]
    parts += [f"- {place}: {header(log)}" for place, log in zip(places, found, strict=True)]
    path = output / "index.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def draw(log: Log, path: Path) -> None:
    """× the baseline's time on each workload of one model, a panel each."""
    from matplotlib.figure import Figure

    entries, columns = contenders(log, ALONE)[::-1], workloads(log, ALONE)
    baseline = log.last(SUITE, suite=ALONE)["baseline"]
    figure = Figure(figsize=(2.2 * len(columns) + 3, 0.22 * len(entries) + 1.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    colours = {"ours": "tab:blue", "theirs": "tab:grey"}
    for panel, workload in zip(panels, columns, strict=True):
        widths = [log.ratio(ALONE, workload, one["contender"], baseline) or 0.0 for one in entries]
        drawn = panel.barh(range(len(entries)), widths, color=[colours[one["side"]] for one in entries])
        panel.bar_label(drawn, [f"{width:.2f}" if width else "" for width in widths], fontsize=6, padding=2)
        panel.set_title(workload, fontsize=8)
        panel.axvline(1.0, color="black", linewidth=0.6)
        panel.margins(x=0.2)
        panel.tick_params(labelsize=6)
    panels[0].set_yticks(range(len(entries)), [f"{one['contender']} ({one['precision']})" for one in entries])
    figure.supxlabel(f"processor time ÷ that of {baseline}; less is faster", fontsize=8)
    figure.savefig(path)


def markdown(table: Table) -> str:
    """A table."""
    head, rows = table
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows))


def _records(log: Log) -> Iterator[Sequence[object]]:
    """One row a figure."""
    where = log.last(HEADER)
    yield ("suite", "workload", "contender", "turn", "cpu_ms", "ms", "rss_mb", "joules", "processor", "threads")
    for line in log.of(TIME):
        yield (line["suite"], line["workload"], line["contender"], line["turn"], f"{1e3 * line['cpu']:.3f}",
               f"{1e3 * line['wall']:.3f}", f"{line['rss'] / MEGA:.0f}", line.get("joules", ""), where["processor"],
               where["threads"])  # fmt: skip
