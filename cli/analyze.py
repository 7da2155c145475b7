"""``bertology-serve analyze``: what heads, layers and deltas do; each analysis writes JSON, CSV, PNG and HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bertology_serve.analysis.settings import (
    AttentionSettings,
    CompareSettings,
    DistanceSettings,
    HeadSettings,
    ProbeSettings,
    PruneSettings,
)
from bertology_serve.cli.common import load_library, note, note_next, progress, table
from bertology_serve.cli.options import options

if TYPE_CHECKING:
    from bertology_serve.analysis.report import AnalysisReport
    from bertology_serve.analysis.subject_model import Advance, Subject


app = typer.Typer(help="See what heads, layers and deltas do.", rich_markup_mode=None)

Backbone = Annotated[str | None, typer.Option(help="Encoder: a hub id, a directory, or minilm (the default).")]
DeltaDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Apply this delta.")]
Out = Annotated[Path, typer.Option(help="Directory for JSON, CSV, PNG and HTML.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")]
Again = Annotated[bool, typer.Option("--again", help="Run even if --out holds the same analysis already.")]


@app.callback()
def _analyze() -> None:
    """See what heads, layers and deltas do."""


@app.command()
@options(AttentionSettings, into="settings")
def attention(
    backbone: Backbone = None,
    delta: DeltaDir = None,
    corpus: Annotated[
        str | None, typer.Option(help="Texts: .txt, a line each, or records as for train. Default: built-in ones.")
    ] = None,
    dependencies: Annotated[
        str | None, typer.Option(help="Parsed sentences: a CoNLL-U file, or example for built-in ones.")
    ] = None,
    sentence: Annotated[
        list[str] | None, typer.Option(help="Show every head's map of this sentence; may be given several times.")
    ] = None,
    out: Out = Path("analysis"),
    device: Device = "auto",
    again: Again = False,
    *,
    settings: AttentionSettings,
) -> None:
    """What each head attends to on a corpus, and which heads attend alike (Clark et al. 2019)."""
    one = subject(backbone, delta, device, corpus)
    from bertology_serve import analysis

    texts = tuple(sentence or ())

    report = kept(
        out, again, [one], (corpus, dependencies), (settings, texts), "attention",
        lambda advance: analysis.attention(
            one, corpus, settings, dependencies=dependencies, sentences=texts, advance=advance
        ),
    )  # fmt: skip
    rows = report.tables["heads"]
    shown = [name for name in rows[0] if name not in ("layer", "head", "cluster")]
    extremes = [(name, *extreme(rows, name)) for name in shown]
    table("heads", ("statistic", "mean", "most", "where"), extremes, stderr=False)
    if dependencies is not None:
        columns = ("relation", "arcs", "layer", "head", "direction", "accuracy", "offset", "offset_accuracy")
        cells = [[row[column] for column in columns] for row in report.tables["relations"]]
        table("the best head of each relation", columns, cells, stderr=False)
    written(report, out)


@app.command()
@options(HeadSettings, into="settings")
def heads(
    delta: Annotated[Path, typer.Option(metavar="DIR", help="The delta whose task judges the heads.")],
    input: Annotated[str, typer.Option(help="Labelled records that importance is measured on.")],
    eval: Annotated[str | None, typer.Option(help="Labelled records for the pruning curve. Default: --input.")] = None,
    backbone: Backbone = None,
    out: Out = Path("analysis"),
    device: Device = "auto",
    again: Again = False,
    *,
    settings: HeadSettings,
) -> None:
    """Which heads a delta's task needs: |dL/dξ|, and the metric as heads are masked (Michel et al. 2019)."""
    one = subject(backbone, delta, device, input, eval)
    from bertology_serve import analysis

    report = kept(
        out, again, [one], (input, eval), [settings], "heads",
        lambda advance: analysis.heads(one, input, settings, eval=eval, advance=advance),
    )  # fmt: skip
    facts = report.facts
    rows = [(order, f"{share:.0%}") for order, share in facts["share_within_tolerance"].items()]
    title = f"{facts['metric']} {facts['unmasked']:.4f} unmasked; heads that go within {facts['tolerance']:g}"
    table(title, ("order", "share"), rows, stderr=False)
    written(report, out)


@app.command()
@options(PruneSettings, into="settings")
def prune(
    delta: Annotated[Path, typer.Option(metavar="DIR", help="The delta whose task judges heads and neurons.")],
    input: Annotated[str, typer.Option(help="Labelled records that importance is measured on.")],
    save: Annotated[Path, typer.Option(metavar="DIR", help="Where the pruned encoder goes: a new directory.")],
    eval: Annotated[str | None, typer.Option(help="Labelled records to measure on. Default: --input.")] = None,
    backbone: Backbone = None,
    out: Out = Path("analysis"),
    device: Device = "auto",
    *,
    settings: PruneSettings,
) -> None:
    """Cut out the heads and FFN neurons that a delta's task needs least; its base's deltas run on what is left."""
    one = subject(backbone, delta, device, input, eval)
    from bertology_serve import analysis

    with bar("prune") as advance:
        report = analysis.prune(one, input, save, settings, eval=eval, advance=advance)
    facts = report.facts
    rows = [
        ("heads", *facts["heads"]), ("neurons", *facts["neurons"]), ("parameters", *facts["parameters"]),
        (facts["metric"], facts["metric_before"], facts["metric_after"]),
        ("tokens/s", *(round(speed) for speed in facts["tokens_per_s"])),
    ]  # fmt: skip
    table(f"{facts['speed_up']:.2f} times as fast", ("", "before", "after"), rows, stderr=False)
    written(report, out)
    note(f"saved to {save}; next:")
    note_next(["train", "--backbone", save, "..."], ["serve", "--backbone", save, "--deltas", delta.parent])


@app.command()
@options(ProbeSettings, into="settings")
def probe(
    input: Annotated[str, typer.Option(help="Records with text or tokens, and label or tags where those are probed.")],
    eval: Annotated[str | None, typer.Option(help="Records to judge on. Default: a quarter of --input.")] = None,
    backbone: Backbone = None,
    delta: DeltaDir = None,
    out: Out = Path("analysis"),
    device: Device = "auto",
    again: Again = False,
    *,
    settings: ProbeSettings,
) -> None:
    """What a linear probe reads from each layer, beside control tasks (Hewitt and Liang 2019)."""
    one = subject(backbone, delta, device, input, eval)
    from bertology_serve import analysis

    report = kept(
        out, again, [one], (input, eval), [settings], "probe",
        lambda advance: analysis.probe(one, input, settings, eval=eval, advance=advance),
    )  # fmt: skip
    columns = ("task", "layer", "accuracy", "macro_f1", "control_accuracy", "selectivity", "majority", "compression")
    rows = [[row[column] for column in columns] for row in report.tables["layers"]]
    table("probes; layer 0 is the embeddings", columns, rows, stderr=False)
    written(report, out)


@app.command()
@options(DistanceSettings, into="settings")
def distance(
    delta: Annotated[Path, typer.Option(metavar="DIR", help="The delta, or a whole tuned model.")],
    backbone: Backbone = None,
    corpus: Annotated[str | None, typer.Option(help="Texts for the features, as for attention.")] = None,
    out: Out = Path("analysis"),
    beside: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Another delta of the same base; may be given several times."),
    ] = None,
    device: Device = "auto",
    again: Again = False,
    *,
    settings: DistanceSettings,
) -> None:
    """How far a delta moved the weights and the features: norms, spectra, linear CKA (Kornblith et al. 2019).

    With --beside several deltas are set beside each other instead: distances per layer, metrics, likeness of every two.
    """
    from bertology_serve import analysis

    if beside:
        return side_by_side([delta, *beside], backbone, corpus, out, device, again, settings)
    one = subject(backbone, delta, device, corpus)
    report = kept(
        out, again, [one], (corpus,), [settings], "distance",
        lambda advance: analysis.distance(one, None, corpus, settings, advance=advance),
    )  # fmt: skip
    rows = [(row["layer"], row["cka"], row["drift"]) for row in report.tables["features"]]
    table("features beside the base's; layer 0 is the embeddings", ("layer", "CKA", "drift"), rows, stderr=False)
    written(report, out)


@app.command()
@options(CompareSettings, into="settings")
def compare(
    first: Annotated[Path, typer.Option(metavar="DIR", help="A delta, or a whole tuned model.")],
    second: Annotated[Path, typer.Option(metavar="DIR", help="Another of the same task and labels.")],
    input: Annotated[str, typer.Option(help="Records that both answer, labelled or not.")],
    backbone: Backbone = None,
    out: Out = Path("analysis"),
    device: Device = "auto",
    again: Again = False,
    *,
    settings: CompareSettings,
) -> None:
    """Where two deltas disagree, and what each attends to and goes by there (integrated gradients, captum)."""
    load_library(deltas=[first, second], data=[input], backbone=backbone, device=device)
    from bertology_serve import analysis

    pair = [subject(backbone, one, device) for one in (first, second)]
    report = kept(
        out, again, pair, (input,), [settings], "compare",
        lambda advance: analysis.compare(pair[0], pair[1], input, settings, advance=advance),
    )  # fmt: skip
    facts = report.facts
    rows = [(name, facts[name]) for name in ("records", "agreement", "metric", "values", "only_first_right",
                                             "only_second_right", "mcnemar_p") if name in facts]  # fmt: skip
    table("two deltas", ("", "value"), [(name, str(value)) for name, value in rows], stderr=False)
    apart = report.tables["disagreements"][:20]
    if apart:
        columns = tuple(apart[0])
        table("widest gaps", columns, [[row[column] for column in columns] for row in apart], stderr=False)
    written(report, out)


def side_by_side(
    deltas: Sequence[Path], backbone: str | None, corpus: str | None, out: Path, device: str, again: bool,
    settings: DistanceSettings,
) -> None:  # fmt: skip
    """``distance --beside``."""
    load_library(deltas=deltas, data=[corpus], backbone=backbone, device=device)
    from bertology_serve import analysis

    subjects = [subject(backbone, delta, device) for delta in deltas]
    report = kept(
        out, again, subjects, (corpus,), [settings], "beside",
        lambda advance: analysis.compare_deltas(subjects, corpus, settings, advance=advance),
    )  # fmt: skip
    for name, title in (("deltas", "distance and metrics"), ("pairs", "every two deltas")):
        rows = report.tables[name]
        table(title, tuple(rows[0]), [tuple(row.values()) for row in rows], stderr=False)
    written(report, out)


@app.command()
def draw(
    report: Annotated[Path, typer.Argument(metavar="JSON", help="A report's JSON.")],
    out: Annotated[Path | None, typer.Option(help="Directory. Default: where the JSON lies.")] = None,
) -> None:
    """Write a report's tables, plots and page again, from its JSON alone."""
    from bertology_serve.analysis.report import AnalysisReport

    written(AnalysisReport.load(report), out or report.parent)


def extreme(rows: object, name: str) -> tuple[float, float, str]:
    """Mean and largest value of a column of the heads' table, and the head that has it."""
    cells = list(rows)  # type: ignore[call-overload]
    best = max(cells, key=lambda row: row[name])
    return sum(row[name] for row in cells) / len(cells), best[name], f"layer {best['layer']} head {best['head']}"


def subject(backbone: str | None, delta: Path | None, device: str, *data: str | None) -> Subject:
    """The encoder, with the delta of a directory (or the newest of its versions) if there is one.

    ``data`` are files that must be there.
    """
    load_library(deltas=[delta], data=data, backbone=backbone, device=device)
    from bertology_serve.analysis.subject_model import Subject
    from bertology_serve.encoder.loading import find_device

    found = Subject.of(backbone, delta, find_device(device))
    found.encoder.prepack()
    return found


def kept(
    out: Path, again: bool, subjects: Sequence[Subject], files: Sequence[str | None], settings: Sequence[object],
    name: str, make: Callable[[Advance], AnalysisReport],
) -> AnalysisReport:  # fmt: skip
    """The report that lies in ``out``, where it is of the same subjects, files and settings, or a new one."""
    from bertology_serve.analysis.report import content_key, remembered

    key = content_key(name, subjects, files, *settings)
    with bar(name) as advance:
        report, lay_there = remembered(out, name, key, lambda: make(advance), again)
    if lay_there:
        note(f"nothing changed since {report.facts['date']}: read back from {out} (--again runs it again)")
    return report


@contextmanager
def bar(name: str) -> Iterator[Advance]:
    """A progress bar as the analyses tell it: (done, total)."""
    with progress() as shown:
        task = shown.add_task(name, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def written(report: AnalysisReport, out: Path) -> None:
    """Saves a report and says where it lies."""
    paths = report.save(out)
    note(f"{len(paths)} files in {out}: {', '.join(path.name for path in paths)}")
    if not any(path.suffix == ".png" for path in paths):
        note("no PNG: matplotlib is missing (pip install 'bertology-serve[plots]'); the HTML page has the figures")
