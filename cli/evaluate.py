"""``bertology-serve evaluate``: how good a delta is, how sure that is, beside what, and where it goes wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bertology_serve.cli.common import load_library, note, progress, table, truncation
from bertology_serve.cli.train import read_columns
from bertology_serve.errors import SpecError

if TYPE_CHECKING:
    from bertology_serve.data.records import Record
    from bertology_serve.data.sets import Answers, Records
    from bertology_serve.deltas.delta import Delta
    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.tasks.metrics import Interval
    from bertology_serve.training.evaluation import Comparison, Evaluation

MOST_CLASSES, WIDEST, MOST_CONFUSED, FLIPS = 30, 10, 10, 3


def evaluate(
    delta: Annotated[Path, typer.Argument(metavar="DIR", help="A delta's directory, or one with its versions.")],
    input: Annotated[str, typer.Option(help="Labelled records: .jsonl, .csv, .tsv (also .gz), .parquet, or hub:NAME.")],
    backbone: Annotated[str | None, typer.Option(help="Encoder. Default: the one that the delta names.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Where fields stand: text=sentence,label=y. Default: as in training.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Another delta or version, on the same records.")] = None,
    by: Annotated[str | None, typer.Option(help="A column: the metrics for each of its values.")] = None,
    query: Annotated[
        str | None, typer.Option(help="A column that says whose candidates records are: nDCG@10 and the like.")
    ] = None,
    errors: Annotated[Path | None, typer.Option(help="JSON lines of what went wrong, the worst first.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON lines of every record with its answer.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for confusion.png and reliability.png.")] = None,
    abstain: Annotated[
        float | None, typer.Option(help="Least score at which a label is named. Default: the delta's own.")
    ] = None,
    baselines: Annotated[bool, typer.Option(help="Measure what needs no training beside it.")] = True,
    max_tokens: Annotated[int, typer.Option(help="Tokens a batch.", min=1)] = 4096,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Measure a delta on labelled records, through the engine that serves it.

    The main metric has a 95 % interval (bootstrap over records); gains are paired.
    """
    load_library(deltas=[delta, against], data=[input], backbone=backbone, device=device)
    from bertology_serve.data.records import field_of, read_records
    from bertology_serve.encoder.loading import find_device
    from bertology_serve.encoder.opening import open_delta
    from bertology_serve.files import check_outputs
    from bertology_serve.training.baselines import rivals
    from bertology_serve.training.evaluation import as_json as plain
    from bertology_serve.training.plots import check_plots

    if plots:
        check_plots()
    check_outputs([errors, output], [input])
    where = find_device(device)
    loaded, encoder = open_delta(delta, backbone, where)
    if abstain is not None:
        loaded = replace(loaded, task=replace(loaded.task, abstain=abstain))
    records = read_records(input, read_columns(columns), loaded.columns)
    started = time.perf_counter()
    found = _run(loaded, encoder, records, max_tokens)
    seconds = time.perf_counter() - started
    metrics = {**official(input, found.metrics, found.answers, records), **found.metrics}
    known = rivals(encoder, found.task, found.examples, found.examples) if baselines else {}
    gains = {name: found.gain(*answers) for name, answers in known.items()}
    beside = {name: task.main(task.parts(answers, found.examples)) for name, (task, answers) in known.items()}
    compared = None
    if against is not None:
        other, base = open_delta(against, backbone, where)
        check_comparable(loaded, other)
        compared = found.against(_run(other, encoder if other.base == loaded.base else base, records, max_tokens))
    named = read_columns(columns) or loaded.columns
    slices = found.slices(field_of(by, named, records)) if by else []
    ranking = found.ranking(field_of(query, named, records)) if query else {}
    _write(errors, found.errors() if errors else ())
    _write(output, (found.row(number) for number in range(len(found.answers))) if output else ())
    if plots:
        from bertology_serve.training.plots import draw_evaluation

        draw_evaluation(found, plots)
    if as_json:
        facts: dict[str, Any] = {"delta": loaded.name, "version": loaded.version, "task": loaded.task.kind}
        facts |= {"rows": len(records), "truncated": found.truncated, "metrics": metrics, "seconds": round(seconds, 3)}
        facts["interval"] = {"metric": found.metric, **plain(found.interval)}
        facts["classes"] = [plain(one) for one in found.classes]
        if found.calibration:
            facts["calibration"] = plain(found.calibration)
        facts["baselines"] = {name: {"value": beside[name], "gain": plain(gain)} for name, gain in gains.items()}
        facts |= {"slices": [plain(one) for one in slices]} if by else {}
        facts |= {"ranking": ranking} if query else {}
        facts |= {"against": plain(compared)} if compared else {}
        return print(json.dumps(facts | {"advice": advice(found, gains)}))
    main = found.metric
    rows = [(name, f"{value:.4f}", _span(found.interval) if name == main else "") for name, value in metrics.items()]
    if found.calibration:
        rows.append(("calibration error", f"{found.calibration.value:.4f}", _span(found.calibration)))
    rows += [(f"{main} of the {name}", f"{beside[name]:.4f}", f"gain {gains[name].points}") for name in beside]
    table(f"{loaded.name} {loaded.version} on {input}", [loaded.task.kind, "value", "95 %"], rows, stderr=False)
    note(f"{len(records):,} records in {seconds:.1f} s")
    if found.truncated:
        note(truncation(found.truncated, len(records)))
    show_classes(found)
    if by:
        parts = [(one.value, one.rows, one.interval.value, _span(one.interval)) for one in slices]
        table(f"by {by}", [by, "records", main, "95 %"], parts, stderr=False)
    if query:
        table(f"candidates of each {query}", ["metric", "value"], list(ranking.items()), stderr=False)
    if compared:
        show_comparison(found, compared, str(against))
    note(advice(found, gains))


def _run(delta: Delta, encoder: Encoder, records: list[Record], max_tokens: int) -> Evaluation:
    from bertology_serve.training.evaluation import evaluate as run

    with progress() as bar:
        task = bar.add_task("evaluate", total=len(records))
        return run(delta, records, encoder, max_tokens, advance=lambda count: bar.advance(task, count))


def check_comparable(delta: Delta, other: Delta) -> None:
    """Raises SpecError where two deltas do not answer the same question."""
    pair = f"--against {other.name} answers {other.task.kind}, {delta.name} {delta.task.kind}"
    if other.task.kind != delta.task.kind:
        raise SpecError(f"{pair}; give a delta of the same task")
    apart = {*delta.task.labels} ^ {*other.task.labels}
    if apart and delta.task.kind != "zero-shot":
        named = ", ".join(sorted(apart)[:5])
        raise SpecError(f"{pair} with other labels (only one of them has {named}); give one trained on the same")


def _write(path: Path | None, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, the whole file or none."""
    from bertology_serve.serving.offline import writing

    if path is None:
        return
    with writing(str(path)) as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n" for row in rows)


def _span(interval: Interval) -> str:
    return f"{interval.low:.4f} to {interval.high:.4f}"


def show_classes(found: Evaluation) -> None:
    """The labels one by one (of many the worst), and what is taken for what."""
    classes = found.classes
    worst = sorted(classes, key=lambda one: one.f1)[:MOST_CLASSES] if len(classes) > MOST_CLASSES else classes
    title = "by label" if worst is classes else f"the {len(worst)} worst of {len(classes)} labels"
    if classes:
        rows = [(one.label, one.precision, one.recall, one.f1, one.support) for one in worst]
        table(title, ["label", "precision", "recall", "f1", "records"], rows, stderr=False)
    if found.confusion is None:
        return
    labels, counts = found.confusion
    if len(labels) <= WIDEST:
        lines = [[label, *row] for label, row in zip(labels, counts, strict=True)]
        table("right (down), answered (across)", ["", *labels], lines, stderr=False)
        return
    off = [(n, labels[a], labels[b]) for a, row in enumerate(counts) for b, n in enumerate(row) if a != b]
    most = [(a, b, n) for n, a, b in sorted(off, reverse=True)[:MOST_CONFUSED] if n]
    table("taken for another", ["right", "answered", "records"], most, stderr=False)


def show_comparison(found: Evaluation, compared: Comparison, other: str) -> None:
    """The difference, whether it is one, and some of what flipped."""
    rows = [
        (f"{found.metric} above it", compared.gain.points),
        ("effect size", f"{compared.effect:+.3f}"),
        ("only this is right", f"{len(compared.fixed):,}"),
        ("only that is right", f"{len(compared.broken):,}"),
    ]
    rows += [("McNemar's p", f"{compared.mcnemar_p:.3g}")] if compared.mcnemar_p is not None else []
    table(f"beside {other}", ["", "value"], rows, stderr=False)
    for name, flipped in (("only this is right", compared.fixed), ("only that is right", compared.broken)):
        for number in flipped[:FLIPS]:
            fields, where = found.records[number]
            note(f"{name}: {where}: {json.dumps(dict(fields), ensure_ascii=False, default=str)[:160]}")


def advice(found: Evaluation, gains: Mapping[str, Interval]) -> str:
    """The one thing to do or to know next."""
    return next(_advice(found, gains), "nothing stands out; --errors FILE shows what went wrong")


def _advice(found: Evaluation, gains: Mapping[str, Interval]) -> Iterator[str]:
    worst = min(gains, key=lambda name: gains[name].value, default=None)
    if worst is not None and gains[worst].low <= 0:
        how = "worse" if gains[worst].high < 0 else "not surely better"
        yield f"{how} than the {worst} ({gains[worst].points} points): more data, or another encoder"
    if found.truncated > len(found.answers) / 10:
        share = 100 * found.truncated / len(found.answers)
        yield f"{share:.0f} % of the texts were cut: train with a larger --max-length, or --long windows"
    if found.calibration and found.calibration.low > 0.05:
        yield "scores do not say how often answers are right: train with --eval of such texts, which calibrates"
    weak = min((one for one in found.classes if one.support >= 5), key=lambda one: one.f1, default=None)
    if weak is not None and weak.f1 < 0.5 * found.interval.value:
        yield f"label {weak.label!r} is the weakest (F1 {weak.f1:.2f}, {weak.support} records): it wants more examples"


def official(input: str, metrics: Mapping[str, float], answers: Answers, records: Records) -> dict[str, float]:
    """The official metrics where the records are of a known set; they stand first."""
    from bertology_serve.data.formats import SET_PREFIX
    from bertology_serve.data.set_files import find_set, parse
    from bertology_serve.data.sets import official_metrics

    return (
        official_metrics(find_set(parse(input)[0]), metrics, answers, records) if input.startswith(SET_PREFIX) else {}
    )
