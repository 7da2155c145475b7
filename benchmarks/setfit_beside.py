"""``train`` with its defaults beside setfit, both on the same encoder and the same few rows of each label.

    python benchmarks/setfit_beside.py --data ../shared/data --log runs.jsonl --setfit ENV/bin/python [--render FOLDER]

``--setfit`` is the Python of an environment with setfit, which this file is run by too: there it imports nothing of
ours. setfit makes ``--iterations`` pairs of each kind for a row (20, its authors' figure), else it has its defaults:
one epoch of contrastive full fine-tuning, then logistic regression. Every figure is a line of ``--log``; the same
command continues, ``--render`` writes the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

SHOTS, TEST = (8, 16, 64), 400
NAMES = ("trec6", "sst2", "snips")
OURS, THEIRS = "train", "setfit"
Rows = Sequence[Mapping[str, Any]]


def main() -> None:
    """Measures what the log does not hold yet, or renders it; as the other environment, answers one cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--log", type=Path)
    parser.add_argument("--setfit", help="the Python of an environment with setfit")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--render", type=Path, metavar="FOLDER")
    parser.add_argument("--note", default="")
    parser.add_argument("--cell", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.cell:
        print(json.dumps(theirs(json.loads(asked.cell.read_text(encoding="utf-8")))))
        return
    from training_defaults import SETS, append, drawn, read, read_log

    if asked.render:
        (asked.render / "setfit.md").write_text(
            "\n".join(page(read_log(asked.log), asked.note)) + "\n", encoding="utf-8"
        )
        return
    from bertology_serve.encoder.loading import locate

    known = {own.name: own for own in SETS}
    for seed in asked.seeds:
        for shots in SHOTS:
            for name in NAMES:
                own = known[name]
                train = few(drawn(read(asked.data, own, "train"), 10**6, 1000 + seed), shots)
                test = drawn(read(asked.data, own, own.split), TEST, 7)
                cell = {
                    "path": locate("minilm"),
                    "train": train,
                    "test": test,
                    "seed": seed,
                    "iterations": asked.iterations,
                }
                for way in (OURS, THEIRS):
                    key = {"set": name, "shots": shots, "seed": seed, "way": way}
                    if not any(key.items() <= line.items() for line in read_log(asked.log)):
                        found = ours(cell) if way == OURS else elsewhere(cell, asked.setfit)
                        append(asked.log, {**key, "rows": len(train), **found})


def few(records: Rows, shots: int) -> list[Mapping[str, Any]]:
    """The first so many records of each label."""
    taken: dict[str, int] = {}
    found = []
    for fields in records:
        label = str(fields["label"])
        taken[label] = taken.get(label, 0) + 1
        if taken[label] <= shots:
            found.append({"text": str(fields["text_a"]), "label": label})
    return found


def ours(cell: Mapping[str, Any]) -> dict[str, Any]:
    """``train`` and ``evaluate``; the seconds are those of training."""
    import bertology_serve as bs

    encoder = bs.Encoder("minilm")
    began = time.process_time()
    delta = bs.train(encoder, cell["train"], seed=cell["seed"])
    seconds = time.process_time() - began
    found = bs.evaluate(delta, [{"text": r["text_a"], "label": r["label"]} for r in cell["test"]], encoder)
    return {"accuracy": found.metrics["accuracy"], "cpu_s": round(seconds, 1)}


def elsewhere(cell: Mapping[str, Any], python: str) -> dict[str, Any]:
    """The same by setfit, in its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cell.json"
        path.write_text(json.dumps(cell), encoding="utf-8")
        run = subprocess.run([python, __file__, "--cell", str(path)], capture_output=True, text=True, cwd=folder)
        if run.returncode:
            raise SystemExit(run.stderr)
        found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return found


def theirs(cell: Mapping[str, Any]) -> dict[str, Any]:
    """What the other environment does: setfit's trainer, and its answers."""
    import setfit
    from datasets import Dataset

    model = setfit.SetFitModel.from_pretrained(cell["path"], trust_remote_code=False)
    options = setfit.TrainingArguments(
        num_iterations=cell["iterations"], seed=cell["seed"], report_to="none", save_strategy="no", output_dir="out"
    )
    rows = Dataset.from_list([{"text": r["text"], "label": r["label"]} for r in cell["train"]])
    trainer = setfit.Trainer(model=model, args=options, train_dataset=rows)
    began = time.process_time()
    trainer.train()
    seconds = time.process_time() - began
    answers = model.predict([str(r["text_a"]) for r in cell["test"]])
    right = fmean(str(found) == str(r["label"]) for found, r in zip(answers, cell["test"], strict=True))
    return {"accuracy": right, "cpu_s": round(seconds, 1), "setfit": setfit.__version__}


def page(lines: Sequence[Mapping[str, Any]], note: str) -> Iterator[str]:
    """The table, the means and what they are of."""
    yield "# train with its defaults beside setfit"
    yield ""
    yield f"`python benchmarks/setfit_beside.py`. MiniLM, one thread of an AMD EPYC. {note}"
    yield ""
    yield f"Accuracy on {TEST} test rows in percent, and the processor seconds of training, by rows of each label."
    yield ""
    yield "| set | rows a label | seeds | setfit | train | setfit, s | train, s | times as fast |"
    yield "|---|---|---|---|---|---|---|---|"
    table: dict[tuple[str, int], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for line in lines:
        table.setdefault((line["set"], line["shots"]), {}).setdefault(line["way"], {})[line["seed"]] = line
    gains, ratios = [], []
    for (name, shots), ways in sorted(table.items(), key=lambda item: (NAMES.index(item[0][0]), item[0][1])):
        seeds = sorted(ways.get(OURS, {}).keys() & ways.get(THEIRS, {}).keys())
        if seeds:
            accuracy, spent = (
                {way: fmean(ways[way][seed][key] for seed in seeds) for way in (THEIRS, OURS)}
                for key in ("accuracy", "cpu_s")
            )
            gains.append(100 * (accuracy[OURS] - accuracy[THEIRS]))
            ratios.append(spent[THEIRS] / spent[OURS])
            figures = [f"{100 * accuracy[way]:.1f}" for way in (THEIRS, OURS)]
            figures += [f"{spent[way]:.0f}" for way in (THEIRS, OURS)]
            yield f"| {name} | {shots} | {len(seeds)} | {' | '.join(figures)} | {ratios[-1]:.1f} |"
    yield ""
    yield f"In the mean train is {fmean(gains):+.1f} points beside setfit, and {fmean(ratios):.1f} times as fast."


if __name__ == "__main__":
    main()
