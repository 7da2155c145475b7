"""Two deltas on the same records: where they disagree, and what each looked at and went by there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bertology_serve.analysis.figures import Figure, HeatMap
from bertology_serve.analysis.head_statistics import TextMaps
from bertology_serve.analysis.integrated_gradients import attributions, check_available, token_names
from bertology_serve.analysis.report import AnalysisReport, origin
from bertology_serve.analysis.settings import CompareSettings
from bertology_serve.analysis.subject_model import Advance, EncoderLike, Subject, TaskEvaluation, data_name, silent
from bertology_serve.data.records import DataLike, read_records
from bertology_serve.deltas.delta import Delta
from bertology_serve.errors import DataError, SpecError
from bertology_serve.files import JsonObject
from bertology_serve.tasks.base import Item
from bertology_serve.tasks.metrics import mcnemar
from bertology_serve.tasks.spec import CLASSIFICATION, REGRESSION, Encoding

ANSWERS = ("label", "labels", "value", "entities", "answer", "choice")


def compare(
    first: Subject | Delta | str | Path,
    second: Subject | Delta | str | Path,
    data: DataLike,
    settings: CompareSettings | None = None,
    *,
    encoder: EncoderLike = None,
    advance: Advance = silent,
) -> AnalysisReport:
    """What two deltas of one task answer to the same records, labelled or not, and where they disagree.

    ``encoder`` is the one that both run on, by default what each names.

    Tables: ``records``, both answers to each, whether they agree, and the gap (the largest difference of class
    probabilities, else of the head's outputs); ``disagreements``, the widest gap first; for the ``settings.shown``
    widest of classification and regression ``tokens``, each token's attribution (see ``attribution``) and attention
    from the first row. The facts have agreement and, for labelled records, both metrics and McNemar's exact test.

    Raises SpecError for deltas of other tasks or labels, Unsupported without captum where attributions are asked for,
    DataError naming a record that is wrong.
    """
    settings = settings or CompareSettings()
    if settings.attributions:
        check_available()
    subjects = [one if isinstance(one, Subject) else Subject.of(encoder, one) for one in (first, second)]
    _check_tasks(subjects)
    started = time.perf_counter()
    records = data if isinstance(data, str | Path) else read_records(data)
    labelled = _labelled(subjects[0], records)
    trials = [TaskEvaluation(one, records, settings.most, settings.max_tokens, labelled) for one in subjects]
    sides = [_answered(trial, advance) for trial in trials]
    rows = [_row(n, item, sides[0][n], sides[1][n], labelled) for n, item in enumerate(trials[0].items)]
    apart = sorted((row for row in rows if not row["agree"]), key=lambda row: (-row["gap"], row["record"]))
    shown = apart[: settings.shown]
    figures, tokens = _looked(trials, sides, shown, settings, advance)
    facts = {**_facts(trials, rows, labelled), "input": data_name(data), "shown": [row["record"] for row in shown],
             "seconds": round(time.perf_counter() - started, 3), **origin()}  # fmt: skip
    tables: dict[str, Sequence[JsonObject]] = {"records": rows, "disagreements": apart}
    if tokens:
        tables["tokens"] = tokens
    return AnalysisReport("compare", facts, tables, _confusion(trials, rows) | figures)


def _check_tasks(subjects: Sequence[Subject]) -> None:
    tasks = [one.delta.task for one in subjects if one.delta is not None]
    if len(tasks) < 2:
        raise SpecError("a comparison is of two deltas or tuned models; got an encoder without a task")
    if (tasks[0].kind, tasks[0].labels) != (tasks[1].kind, tasks[1].labels):
        said = " and ".join(f"{task.kind} of {', '.join(task.labels) or 'no labels'}"[:80] for task in tasks)
        raise SpecError(f"the two answer different questions: {said}; give two deltas of one task and one label set")


def _labelled(subject: Subject, data: DataLike) -> bool:
    """Whether the first record has the task's labels."""
    record = read_records(data, remembered=subject.delta.columns if subject.delta else None)[0]
    try:
        TaskEvaluation.task_of(subject).example(record.fields, record.where, labelled=True)
    except DataError:
        return False
    return True


@torch.inference_mode()
def _answered(trial: TaskEvaluation, advance: Advance) -> list[tuple[JsonObject, Tensor]]:
    """Each item's answer, and the head's output for it (of all its sequences)."""
    found: dict[int, tuple[JsonObject, Tensor]] = {}
    numbers = {id(item): number for number, item in enumerate(trial.items)}
    for items in trial.groups():
        out = trial.output(trial.pack(items)).float().cpu()
        for item, parts in zip(items, trial.parts(out, items), strict=True):
            answer = trial.task.decode(item.example, item.encodings, parts)
            found[numbers[id(item)]] = answer, torch.cat([part.flatten() for part in parts])
        advance(len(found), len(trial.items))
    return [found[number] for number in range(len(trial.items))]


def _said(answer: JsonObject) -> str | float:
    """The part of an answer that two models agree on or not."""
    name = next(name for name in ANSWERS if name in answer)
    if name == "labels":
        return ", ".join(answer[name]) or "none"
    if name == "entities":
        return ", ".join(f"{one['label']} {one['start']}-{one['end']}" for one in answer[name]) or "none"
    said: str | float = answer[name]["text"] if name == "answer" else answer[name]
    return said


def _row(
    number: int, item: Item, first: tuple[JsonObject, Tensor], second: tuple[JsonObject, Tensor],
    labelled: bool,
) -> JsonObject:  # fmt: skip
    """``gap``: the largest difference of class probabilities, else of the head's outputs."""
    (one, out), (other, outs) = first, second
    scores = [dict(answer["scores"]) if isinstance(answer.get("scores"), Mapping) else None for answer in (one, other)]
    if scores[0] and scores[1]:
        gap = max(abs(scores[0][name] - scores[1][name]) for name in scores[0])
    else:
        gap = float((out - outs).abs().max())
    a, b = _said(one), _said(other)
    agree = abs(a - b) < 0.5 if isinstance(a, float) and isinstance(b, float) else a == b
    row = {"record": number, "first": a, "second": b, "agree": agree, "gap": gap}
    gold = [getattr(item.example, name) for name in ("label", "score") if hasattr(item.example, name)]
    return {**row, "gold": gold[0]} if labelled and gold else row


def _facts(trials: Sequence[TaskEvaluation], rows: Sequence[JsonObject], labelled: bool) -> JsonObject:
    one, other = (trial.subject for trial in trials)
    facts: JsonObject = {
        "first": one.facts(), "second": other.facts(), "records": len(rows),
        "agreement": sum(row["agree"] for row in rows) / len(rows),
    }  # fmt: skip
    if labelled:
        metric = trials[0].task.main_metric
        facts |= {"metric": metric, "values": [trial.measure()[metric] for trial in trials]}
    if labelled and all("gold" in row and isinstance(row["first"], str) for row in rows):
        only = [sum(row[a] == row["gold"] != row[b] for row in rows) for a, b in (("first", "second"),
                                                                                ("second", "first"))]  # fmt: skip
        facts |= {"only_first_right": only[0], "only_second_right": only[1], "mcnemar_p": mcnemar(*only)}
    return facts


def _confusion(trials: Sequence[TaskEvaluation], rows: Sequence[JsonObject]) -> dict[str, Figure]:
    labels = list(trials[0].task.spec.labels)
    names = [trial.subject.delta.name if trial.subject.delta else "" for trial in trials]
    if trials[0].task.spec.kind != CLASSIFICATION or not labels:
        return {}
    values = [[float(sum(row["first"] == a and row["second"] == b for row in rows)) for b in labels] for a in labels]
    panel = HeatMap("", values, f"first: {names[0]}", f"second: {names[1]}", "records", None, labels, labels)
    return {"answers": Figure(f"Answers: {names[0]} against {names[1]}", [panel])}


def _looked(
    trials: Sequence[TaskEvaluation], sides: Sequence[Sequence[tuple[JsonObject, Tensor]]],
    shown: Sequence[JsonObject], settings: CompareSettings, advance: Advance,
) -> tuple[dict[str, Figure], list[JsonObject]]:  # fmt: skip
    """A figure a shown record, and a row a token; nothing for tasks whose answers are not one for the whole text."""
    spec = trials[0].task.spec
    if spec.kind not in (CLASSIFICATION, REGRESSION):
        return {}, []
    figures, rows = {}, []
    for done, row in enumerate(shown, 1):
        number = row["record"]
        ends = [int(side[number][1].argmax()) for side in sides]
        panels, own = _record(trials, number, ends, settings)
        said = f"{row['first']} / {row['second']}" + (f", labelled {row['gold']}" if "gold" in row else "")
        figures[f"record{number}"] = Figure(f"Record {number}: {said}", panels, 1)
        rows += [{"record": number, **line} for line in own]
        advance(done, len(shown))
    return figures, rows


def _record(
    trials: Sequence[TaskEvaluation], number: int, ends: Sequence[int], settings: CompareSettings
) -> tuple[list[HeatMap], list[JsonObject]]:
    regression = trials[0].task.spec.kind == REGRESSION

    def margin(out: Tensor) -> Tensor:
        return out[:, 0] if regression else out[:, ends[0]] - out[:, ends[1]]

    names, found, maps, missed = [], [], [], []
    for trial in trials:
        encoding = trial.items[number].encodings[0]
        names.append(token_names(trial.subject, encoding))
        maps.append(_attention(trial.subject, encoding))
        if settings.attributions:
            own, rest = attributions(trial.subject, encoding, margin, settings.steps)
            found.append(own)
            missed.append(rest)
    titles = [trial.subject.delta.name if trial.subject.delta else "" for trial in trials]
    panels, same = [], names[0] == names[1]
    if found:
        what = "value" if regression else "margin of the first's answer over the second's"
        most = max(abs(value) for own in found for value in own) or 1.0
        for group in [[0, 1]] if same else [[0], [1]]:
            panels.append(HeatMap(f"what each token adds to the {what}", [found[i] for i in group], "", "token",
                                  "logits" if not regression else "value", (-most, most), [titles[i] for i in group],
                                  names[group[0]], True))  # fmt: skip
    words = [value for layers in maps for row in layers for value in row[1:-1]]
    for title, layers, tokens in zip(titles, filter(None, maps), names, strict=False):
        panels.append(HeatMap(f"attention from the first row: {title}", layers, "layer", "token",
                              "share, mean over heads (scale: up to the most on a word)",
                              (0.0, max(words, default=1.0)), (), tokens))  # fmt: skip
    rows = [
        {"side": title, "token": token, "place": place,
         "attribution": found[side][place] if found else None,
         "missed": missed[side] if found else None, "attention_last": maps[side][-1][place] if maps[side] else None}
        for side, title in enumerate(titles) for place, token in enumerate(names[side])
    ]  # fmt: skip
    return panels, rows


@torch.inference_mode()
def _attention(subject: Subject, encoding: Encoding) -> list[list[float]]:
    """From the first row to every token, mean over heads: [L][n]; nothing where the family keeps its own attention."""
    batch = subject.pack([encoding])
    if not subject.encoder.packs:
        return []
    watch = TextMaps(batch)
    subject.run(batch, watch)
    return [own[:, 0].mean(0).double().tolist() for own in watch.maps[0]]
