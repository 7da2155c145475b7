"""What ``train`` does with its defaults, beside scikit-learn's logistic regression on the frozen encoder's mean rows.

    python benchmarks/training_defaults.py --data ../shared/data --log runs.jsonl [--seeds 0 1 2] [--render FOLDER]

Every figure is a line of ``--log``, appended as soon as it is known; the same command continues. Seeds are the
outermost loop and small sizes come first, so that a part of the work is of use. Both sides learn from the same rows
and choose by the same others (``train --eval``; C), as many as there are to learn from, at most 400; neither sees test
rows. ``--render`` writes the table, the plot and the CSV of whatever the log holds, and measures nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import bertology_serve as bs
from bertology_serve.data.formats import Fields
from bertology_serve.data.records import read_records
from bertology_serve.encoder.pipeline import BASE
from bertology_serve.export.installation import environment
from bertology_serve.tasks.metrics import spearman

SIZES = (100, 400, 1000, 4000)
CHOSEN_ON = ("snips", "sst2", "trec6")
"""The sets that the defaults were chosen on; the others judge."""
MOST_TEST, MOST_DEV = 500, 400
SHARES, SMOOTH = np.logspace(-4, 4, 9), np.logspace(-2, 5, 8)
"""C of the logistic regression, alpha of the ridge."""
LOGISTIC, DEFAULT, COSINE = "logistic regression", "train", "cosine"


@dataclass(frozen=True)
class Set:
    """A data set: its folder, the split that is answered, and what of it is taken."""

    name: str
    folder: str
    split: str
    sizes: Sequence[int] = SIZES
    labels: int = 0
    task: str = "classification"
    most: int = MOST_TEST


SETS = (
    Set("banking77, 10 labels", "banking77", "test", sizes=(400,), labels=10),
    Set("trec6", "trec6", "test"),
    Set("snips", "snips", "test"),
    Set("banking77", "banking77", "test"),
    Set("sst2", "sst2", "dev"),
    Set("cola", "cola", "dev"),
    Set("ag_news", "ag_news", "test"),
    Set("mnli", "mnli", "dev"),
    Set("mrpc", "mrpc", "test", most=1000),
    Set("stsb", "stsb", "dev", task="regression"),
    Set("rte", "rte", "dev"),
    Set("boolq", "boolq", "dev"),
    Set("banking77, all rows", "banking77", "test", sizes=(10_003,), most=3080),
)
"""The quicker first. A size of more rows than there are takes them all."""


@dataclass(frozen=True)
class Cell:
    """One set, one number of training rows, one seed, and the records that are trained on and answered."""

    set: Set
    size: int
    seed: int
    train: Sequence[Fields]
    dev: Sequence[Fields]
    test: Sequence[Fields]


def main() -> None:
    """Measures what the log does not hold yet, or renders it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="*", default=[*SIZES, 10_003])
    parser.add_argument("--sets", nargs="*", default=[own.name for own in SETS])
    parser.add_argument("--render", type=Path, metavar="FOLDER")
    parser.add_argument("--note", default="", help="said at the head of the table: commit, machine, what is missing")
    asked = parser.parse_args()
    if asked.render:
        render(read_log(asked.log), asked.render, asked.note)
        return
    encoder = bs.Encoder(asked.backbone)
    ways: Mapping[str, Callable[[Cell, bs.Encoder], float]] = {LOGISTIC: regressed, COSINE: cosine, DEFAULT: trained}
    for cell in cells(asked.data, asked.seeds, asked.sizes, asked.sets):
        for way, measured in ways.items():
            key = {"set": cell.set.name, "rows": cell.size, "seed": cell.seed, "way": way}
            if (way == COSINE and cell.set.task == "classification") or any(
                key.items() <= line.items() for line in read_log(asked.log)
            ):
                continue
            began = time.process_time()
            metric = measured(cell, encoder)
            seconds = time.process_time() - began
            line = {**key, "metric": metric, "cpu_s": round(seconds, 2), "trained_on": len(cell.train)}
            line["chosen_on"] = len(cell.dev)
            append(asked.log, {**line, "tested_on": len(cell.test), "load": os.getloadavg()[0], **environment()})


def cells(folder: Path, seeds: Sequence[int], sizes: Sequence[int], names: Sequence[str]) -> Iterator[Cell]:
    """Seeds outermost, then sizes, then sets."""
    for seed in seeds:
        for size in sizes:
            for own in SETS:
                if own.name in names and size in own.sizes:
                    train, test = (read(folder, own, split) for split in ("train", own.split))
                    if size <= len(train) or size == min(n for n in own.sizes if n >= len(train)):
                        order = drawn(train, len(train), 1000 + seed, own.task == "classification")
                        held = min(size, MOST_DEV, len(order) // 10 if size >= len(order) else len(order))
                        fit, dev = order[: len(order) - held][:size], order[len(order) - held :]
                        yield Cell(own, size, seed, fit, dev, drawn(test, own.most, 7))


def read(folder: Path, own: Set, split: str) -> list[Fields]:
    """The records of a split, of the first labels where not all are taken."""
    records = [fields for fields, _ in read_records(folder / own.folder / f"{split}.jsonl.gz")]
    kept = sorted({str(fields["label"]) for fields in records})[: own.labels or None]
    return [fields for fields in records if own.task != "classification" or str(fields["label"]) in kept]


def drawn(records: Sequence[Fields], count: int, seed: int, each: bool = False) -> list[Fields]:
    """So many of the records; with ``each`` at least one of every label that there is room for."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    first = {str(records[i]["label"]): i for i in reversed(order)} if each else {}
    chosen = list(dict.fromkeys([*first.values(), *order]))[:count]
    return [records[i] for i in chosen]


def trained(cell: Cell, encoder: bs.Encoder) -> float:
    """``train`` as a user would call it, and ``evaluate``."""
    delta = bs.train(encoder, cell.train, eval=cell.dev, task=cell.set.task, seed=cell.seed)
    return next(iter(bs.evaluate(delta, cell.test, encoder).metrics.values()))


def regressed(cell: Cell, encoder: bs.Encoder) -> float:
    """Logistic regression on mean rows; ridge regression for scores."""
    x, x_dev, x_test = (mean_rows(encoder, records) for records in (cell.train, cell.dev, cell.test))
    if cell.set.task == "regression":
        y, dev, gold = (np.array([float(r["label"]) for r in records]) for records in (cell.train, cell.dev, cell.test))
        ridges = [make_pipeline(StandardScaler(), Ridge(alpha)).fit(x, y) for alpha in SMOOTH]
        return spearman(gold, max(ridges, key=lambda fitted: spearman(dev, fitted.predict(x_dev))).predict(x_test))
    y, dev, gold = (np.array([str(r["label"]) for r in records]) for records in (cell.train, cell.dev, cell.test))
    fitted = [LogisticRegression(C=c, max_iter=1000).fit(x, y) for c in SHARES]
    return float((max(fitted, key=lambda one: (one.predict(x_dev) == dev).mean()).predict(x_test) == gold).mean())


def cosine(cell: Cell, encoder: bs.Encoder) -> float:
    """The untouched encoder's own answer for scored pairs."""
    pipeline = bs.Pipeline(encoder)
    texts = [[str(fields[name]) for fields in cell.test] for name in ("text_a", "text_b")]
    first, second = (
        np.array([found.answer["embedding"] for found in pipeline.answer(bs.Request(BASE, {"text": t}) for t in own)])
        for own in texts
    )
    return spearman([float(fields["label"]) for fields in cell.test], (first * second).sum(1))


@torch.inference_mode()
def mean_rows(encoder: bs.Encoder, records: Sequence[Fields]) -> Any:
    """[N, H] float64: the mean of the last layer's rows, by transformers' own forward pass over padded batches."""
    from transformers import AutoModel

    from bertology_serve.encoder.loading import locate

    model = AutoModel.from_pretrained(locate(encoder.name), trust_remote_code=False).eval()
    columns = [[str(fields[name]) for fields in records] for name in ("text_a", "text_b") if name in records[0]]
    lengths = encoder.tokenizer(*columns, truncation=True, max_length=128)["input_ids"]
    order = sorted(range(len(records)), key=lambda i: len(lengths[i]))
    found = np.empty((len(records), model.config.hidden_size))
    for at in range(0, len(order), 32):
        members = order[at : at + 32]
        texts = ([own[i] for i in members] for own in columns)
        batch = encoder.tokenizer(*texts, truncation=True, max_length=128, padding=True, return_tensors="pt")
        mask = batch["attention_mask"][:, :, None]
        rows = model(**batch).last_hidden_state
        found[members] = ((rows * mask).sum(1) / mask.sum(1)).double().numpy()
    return found


def append(path: Path, line: Mapping[str, Any]) -> None:
    """One line more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines so far; one that was cut by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


Pairs = Mapping[tuple[str, int], Mapping[str, Mapping[int, dict[str, Any]]]]


def render(lines: Sequence[dict[str, Any]], folder: Path, note: str) -> None:
    """``training_defaults`` as CSV, Markdown and, where matplotlib is installed, PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["set", "rows", "seed", "way", "metric", "cpu_s", "trained_on", "chosen_on", "tested_on", "load", "date"]
    with (folder / "training_defaults.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    found: dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for line in lines:
        found.setdefault((line["set"], line["rows"]), {}).setdefault(line["way"], {})[line["seed"]] = line
    whole = {place: ways for place, ways in found.items() if {LOGISTIC, DEFAULT} <= ways.keys()}
    (folder / "training_defaults.md").write_text("\n".join(page(whole, lines, note)) + "\n", encoding="utf-8")
    draw(whole, folder / "training_defaults.png")


def page(found: Pairs, lines: Sequence[Mapping[str, Any]], note: str) -> Iterator[str]:
    """The table, after what was measured on what, and its means."""
    last = lines[-1]
    versions = ", ".join(f"{name} {last['versions'][name]}" for name in ("torch", "transformers"))
    yield "# train with its defaults beside logistic regression"
    yield ""
    place = f"{lines[0]['date'][:10]}. {last['cpu']}, one thread; {versions}"
    yield f"`python benchmarks/training_defaults.py`, {place}. {note}"
    yield ""
    yield (
        "Test metric in percent, mean ± standard deviation over seeds: accuracy, and Spearman's correlation for stsb. "
        "*Logistic* is scikit-learn's logistic regression (ridge regression for stsb) on the mean of the frozen "
        "encoder's last rows. *train* is `train` without any option but the task. Both learn from the rows named, and "
        "choose (C; the state that is kept) by as many others, at most 400 (`--eval`). The defaults were chosen on "
        f"{', '.join(CHOSEN_ON)}; the other sets judge. *gain* is paired by seed; seconds are processor time, reading "
        "the data left out."
    )
    yield ""
    yield "| set | rows | seeds | logistic | train | gain | logistic, s | train, s |"
    yield "|---|---|---|---|---|---|---|---|"
    for own in SETS:
        for (name, _), ways in sorted(found.items(), key=lambda item: item[0][1]):
            if name == own.name:
                seeds = gains(ways)
                both = [[100 * ways[way][seed]["metric"] for seed in seeds] for way in (LOGISTIC, DEFAULT)]
                spent = [statistics.fmean(ways[way][seed]["cpu_s"] for seed in seeds) for way in (LOGISTIC, DEFAULT)]
                count = ways[DEFAULT][next(iter(seeds))]["trained_on"]
                title = name + ("*" if own.folder in CHOSEN_ON else "")
                row = [
                    title,
                    f"{count:,}",
                    len(seeds),
                    *map(spread, both),
                    f"{100 * statistics.fmean(seeds.values()):+.1f}",
                ]
                yield f"| {' | '.join(map(str, row))} | {spent[0]:.0f} | {spent[1]:.0f} |"
    yield ""
    yield "\\* the defaults were chosen on this set."
    yield ""
    yield from means(found)
    untouched = {name: ways[COSINE] for (name, _), ways in found.items() if COSINE in ways}
    for name, by_seed in untouched.items():
        value = statistics.fmean(line["metric"] for line in by_seed.values())
        yield f"The cosine of the untouched encoder's embeddings has {100 * value:.1f} on {name}."


def means(found: Pairs) -> Iterator[str]:
    """The mean gain by size, over all classification sets and over those that judge."""
    yield "| rows | mean gain, all sets | mean gain, sets that judge | least gain |"
    yield "|---|---|---|---|"
    plain = {own.name: own for own in SETS if own.task == "classification" and len(own.sizes) == len(SIZES)}
    for size in SIZES:
        each = {
            name: 100 * statistics.fmean(gains(ways).values())
            for (name, rows), ways in found.items()
            if rows == size and name in plain
        }
        judged = [gain for name, gain in each.items() if name not in CHOSEN_ON]
        if each:
            worst = min(each, key=each.__getitem__)
            judging = f"{statistics.fmean(judged):+.1f} ({len(judged)})" if judged else ""
            whole = f"{statistics.fmean(each.values()):+.1f} ({len(each)})"
            yield f"| {size:,} | {whole} | {judging} | {each[worst]:+.1f} ({worst}) |"
    yield ""


def gains(ways: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[int, float]:
    """What ``train`` has more, by seed."""
    both = ways[LOGISTIC].keys() & ways[DEFAULT].keys()
    return {seed: ways[DEFAULT][seed]["metric"] - ways[LOGISTIC][seed]["metric"] for seed in sorted(both)}


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def draw(found: Pairs, path: Path) -> None:
    """The gain over the rows, one line a set."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4.2), dpi=120)
    panel = figure.add_subplot()
    for own in SETS:
        points = sorted(
            (next(iter(ways[DEFAULT].values()))["trained_on"], 100 * statistics.fmean(gains(ways).values()))
            for (name, _), ways in found.items()
            if name == own.name
        )
        if points:
            style = "--" if own.folder in CHOSEN_ON else "-"
            panel.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=own.name)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set(xscale="log", xlabel="training rows", ylabel="points over logistic regression")
    panel.set_title("train with its defaults (dashed: sets that the defaults were chosen on)", fontsize=9)
    panel.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main()
