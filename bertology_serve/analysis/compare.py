"""``analyze compare``: two deltas on the same records, where they disagree, and what each looked at there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertology_serve.analysis.attribution import attributions, check_available
from bertology_serve.analysis.figures import Figure, HeatMap
from bertology_serve.analysis.head_statistics import TextMaps
from bertology_serve.analysis.labelled import Labelled, TaskEvaluation
from bertology_serve.analysis.report import Report, origin
from bertology_serve.analysis.settings import CompareSettings
from bertology_serve.analysis.subject_model import Advance, Subject, silent
from bertology_serve.data.records import read_records
from bertology_serve.deltas.delta import Delta
from bertology_serve.errors import DataError, SpecError
from bertology_serve.tasks.significance import mcnemar
from bertology_serve.tasks.spec import CLASSIFICATION, REGRESSION

ANSWERS = ("label", "value", "entities", "answer", "choice")
LONGEST_NAME = 14


def compare(
    first: Subject | Delta | str | Path,
    second: Subject | Delta | str | Path,
    input: str | Path = "",
    settings: CompareSettings | None = None,
    *,
    advance: Advance = silent,
) -> Report:
    """Both deltas' answers to every record, agreement, metrics where records are labelled, and the widest gaps.

    For the ``shown`` widest gaps of classification and regression also each token's attribution (see ``attribution``)
    and attention from the first row. Raises SpecError for deltas of other tasks or labels; Unsupported without captum.
    """
    settings = settings or CompareSettings()
    if settings.attributions:
        check_available()
    subjects = [one if isinstance(one, Subject) else Subject.of(None, one) for one in (first, second)]
    _check_tasks(subjects)
    started = time.perf_counter()
    labelled = _labelled(subjects[0], input)
    trials = [TaskEvaluation(one, input, settings.most, settings.max_tokens, labelled) for one in subjects]
    sides = [_answered(trial, advance) for trial in trials]
    rows = [_row(n, item, sides[0][n], sides[1][n], labelled) for n, item in enumerate(trials[0].items)]
    apart = sorted((row for row in rows if not row["agree"]), key=lambda row: (-row["gap"], row["record"]))
    shown = apart[: settings.shown]
    figures, tokens = _looked(trials, sides, shown, settings, advance)
    facts = {**_facts(trials, rows, labelled), "input": str(input), "shown": [row["record"] for row in shown],
             "seconds": round(time.perf_counter() - started, 3), **origin()}  # fmt: skip
    tables: dict[str, Sequence[Mapping[str, Any]]] = {"records": rows, "disagreements": apart}
    if tokens:
        tables["tokens"] = tokens
    return Report("compare", facts, tables, _confusion(trials, rows) | figures)


def _check_tasks(subjects: Sequence[Subject]) -> None:
    tasks = [one.delta.task for one in subjects if one.delta is not None]
    if len(tasks) < 2:
        raise SpecError("a comparison is of two deltas or tuned models; got an encoder without a task")
    if (tasks[0].kind, tasks[0].labels) != (tasks[1].kind, tasks[1].labels):
        said = " and ".join(f"{task.kind} of {', '.join(task.labels) or 'no labels'}"[:80] for task in tasks)
        raise SpecError(f"the two answer different questions: {said}; give two deltas of one task and one label set")


def _labelled(subject: Subject, input: str | Path) -> bool:
    """Whether the file's first record has the task's labels."""
    record = read_records(input, remembered=subject.delta.columns if subject.delta else None)[0]
    try:
        TaskEvaluation.task_of(subject).example(record.fields, record.where, labelled=True)
    except DataError:
        return False
    return True


@torch.inference_mode()
def _answered(trial: TaskEvaluation, advance: Advance) -> list[tuple[Mapping[str, Any], Tensor]]:
    """Each item's answer, and the head's output for it (of all its sequences)."""
    found: dict[int, tuple[Mapping[str, Any], Tensor]] = {}
    numbers = {id(item): number for number, item in enumerate(trial.items)}
    for items in trial.groups():
        out = trial.output(trial.pack(items)).float().cpu()
        for item, parts in zip(items, trial.parts(out, items), strict=True):
            answer = trial.task.decode(item.example, item.encodings, parts)
            found[numbers[id(item)]] = answer, torch.cat([part.flatten() for part in parts])
        advance(len(found), len(trial.items))
    return [found[number] for number in range(len(trial.items))]


def _said(answer: Mapping[str, Any]) -> Any:
    """The part of an answer that two models agree on or not."""
    name = next(name for name in ANSWERS if name in answer)
    value = answer[name]
    if name == "entities":
        return ", ".join(f"{one['label']} {one['start']}-{one['end']}" for one in value) or "none"
    return value["text"] if name == "answer" else value


def _row(
    number: int, item: Labelled, first: tuple[Mapping[str, Any], Tensor], second: tuple[Mapping[str, Any], Tensor],
    labelled: bool,
) -> dict[str, Any]:  # fmt: skip
    """``gap``: the largest difference of class probabilities, else of the head's outputs."""
    (one, out), (other, outs) = first, second
    scores = [dict(answer["scores"]) if isinstance(answer.get("scores"), Mapping) else None for answer in (one, other)]
    if scores[0] and scores[1]:
        gap = max(abs(scores[0][name] - scores[1][name]) for name in scores[0])
    else:
        gap = float((out - outs).abs().max())
    said = [_said(one), _said(other)]
    agree = abs(said[0] - said[1]) < 0.5 if isinstance(said[0], float) else said[0] == said[1]
    row = {"record": number, "first": said[0], "second": said[1], "agree": agree, "gap": gap}
    gold = [getattr(item.example, name) for name in ("label", "score") if hasattr(item.example, name)]
    return {**row, "gold": gold[0]} if labelled and gold else row


def _facts(trials: Sequence[TaskEvaluation], rows: Sequence[Mapping[str, Any]], labelled: bool) -> dict[str, Any]:
    one, other = (trial.subject for trial in trials)
    facts: dict[str, Any] = {
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


def _confusion(trials: Sequence[TaskEvaluation], rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    labels = list(trials[0].task.spec.labels)
    names = [trial.subject.delta.name if trial.subject.delta else "" for trial in trials]
    if trials[0].task.spec.kind != CLASSIFICATION or not labels:
        return {}
    values = [[float(sum(row["first"] == a and row["second"] == b for row in rows)) for b in labels] for a in labels]
    panel = HeatMap("", values, f"first: {names[0]}", f"second: {names[1]}", "records", None, labels, labels)
    return {"answers": Figure(f"Answers: {names[0]} against {names[1]}", [panel])}


def _looked(
    trials: Sequence[TaskEvaluation], sides: Sequence[Sequence[tuple[Mapping[str, Any], Tensor]]],
    shown: Sequence[Mapping[str, Any]], settings: CompareSettings, advance: Advance,
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:  # fmt: skip
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
) -> tuple[list[HeatMap], list[dict[str, Any]]]:
    regression = trials[0].task.spec.kind == REGRESSION

    def margin(out: Tensor) -> Tensor:
        return out[:, 0] if regression else out[:, ends[0]] - out[:, ends[1]]

    names, found, maps, missed = [], [], [], []
    for trial in trials:
        encoding = trial.items[number].encodings[0]
        pieces = trial.subject.encoder.tokenizer.convert_ids_to_tokens(list(encoding.ids))
        names.append([str(piece)[:LONGEST_NAME] for piece in pieces])
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
def _attention(subject: Subject, encoding: Any) -> list[list[float]]:
    """From the first row to every token, mean over heads: [L][n]; nothing where the family keeps its own attention."""
    batch = subject.pack([encoding])
    if not subject.encoder.packs:
        return []
    watch = TextMaps(batch)
    subject.run(batch, watch)
    return [own[:, 0].mean(0).double().tolist() for own in watch.maps[0]]
