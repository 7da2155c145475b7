"""Zero-shot deltas on labels that training did not see, beside the untouched encoder's nearest label name.

    python benchmarks/zero_shot.py --data ../shared/data --json results.json

For each seed some of the labels of banking77, and of snips, are held out; a delta is trained on rows of the others and
measured on the test rows of the held-out labels, among these alone and among all labels; and on the other set, none of
whose labels it has seen. What chooses the state that is kept are rows of labels that training saw.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import bertology_serve as bs
from bertology_serve.data.records import Record, read_records
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.tasks.zero_shot import readable
from bertology_serve.training.baselines import NAMES, rivals

HELD_OUT = {"banking77": 20, "snips": 3}
COLUMNS = {"banking77": {"text": "text_a"}, "snips": {"text": "text_a"}}


def rows_of(path: Path, name: str, split: str) -> dict[str, list[Record]]:
    """The records of a set's split by their labels."""
    found = defaultdict(list)
    for fields, where in read_records(str(path / name / f"{split}.jsonl.gz"), COLUMNS[name]):
        found[str(fields["label"])].append((fields, where))
    return dict(sorted(found.items()))


def some(rows: Mapping[str, Sequence[Record]], labels: Sequence[str], each: int, seed: int) -> list[Record]:
    """At most so many rows of each label, drawn by the seed."""
    drawn = random.Random(seed)
    return [row for label in labels for row in drawn.sample(list(rows[label]), min(each, len(rows[label])))]


def measured(delta: Delta, encoder: Encoder, rows: list[Record]) -> dict[str, float]:
    """Accuracy and macro F1 among the labels of these rows, and the nearest label name's accuracy."""
    found = bs.evaluate(delta, [dict(fields) for fields, _ in rows], encoder)
    task, answers = rivals(encoder, found.task, found.examples, found.examples)[NAMES]
    names = task.metrics(answers, found.examples)
    return {
        "rows": len(rows),
        "labels": len(found.task.spec.labels),
        "accuracy": found.metrics["accuracy"],
        "macro_f1": found.metrics["macro_f1"],
        "names_accuracy": names["accuracy"],
        "names_macro_f1": names["macro_f1"],
    }


def among_all(delta: Delta, encoder: Encoder, rows: list[Record], labels: Sequence[str]) -> dict[str, float]:
    """Accuracies on rows where all labels of the set are there to choose from."""
    pipeline, texts, gold = bs.Pipeline(encoder, [delta]), [f["text"] for f, _ in rows], [f["label"] for f, _ in rows]
    asked = [{"text": text, "labels": list(labels)} for text in texts]
    found = [one.answer["label"] for one in pipeline(asked, delta=delta.name)]
    vectors = np.array([one.answer["embedding"] for one in pipeline([*map(readable, labels), *texts])])
    nearest = (vectors[len(labels) :] @ vectors[: len(labels)].T).argmax(1)
    return {
        "labels": len(labels),
        "accuracy": float(np.mean([a == b for a, b in zip(found, gold, strict=True)])),
        "names_accuracy": float(np.mean([labels[i] == b for i, b in zip(nearest, gold, strict=True)])),
    }


def run(name: str, other: str, seed: int, options: argparse.Namespace, encoder: Encoder) -> dict[str, object]:
    """One delta: what it was trained on, and its figures."""
    train, test = rows_of(options.data, name, "train"), rows_of(options.data, name, "test")
    labels = list(train)
    held = sorted(random.Random(seed).sample(labels, HELD_OUT[name]))
    seen = [label for label in labels if label not in held]
    drawn = some(train, seen, options.rows + options.dev, seed)
    random.Random(seed).shuffle(drawn)
    cut = len(seen) * options.dev
    delta = bs.train(
        encoder,
        [dict(fields) for fields, _ in drawn[cut:]],
        eval=[dict(fields) for fields, _ in drawn[:cut]],
        task="zero-shot",
        method=options.method,
        name="zero-shot",
        seed=seed,
        epochs=options.epochs,
    )
    held_rows = some(test, held, options.test, seed)
    far = rows_of(options.data, other, "test")
    found = {
        "set": name,
        "seed": seed,
        "held_out": held,
        "train_rows": len(drawn) - cut,
        "steps_s": delta.provenance["seconds"],
        "held-out labels": measured(delta, encoder, held_rows),
        "held-out labels among all": among_all(delta, encoder, held_rows, labels),
        "seen labels": measured(delta, encoder, some(test, seen, options.test, seed)),
        f"{other} (no label seen)": measured(delta, encoder, some(far, list(far), options.test, seed)),
    }
    print(json.dumps(found, indent=1), flush=True)
    return found


def main() -> None:
    """All sets and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--sets", nargs="+", default=["banking77", "snips"], choices=list(HELD_OUT))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rows", type=int, default=30, help="training rows of each label")
    parser.add_argument("--dev", type=int, default=5, help="rows of each label that choose the state")
    parser.add_argument("--test", type=int, default=40, help="test rows of each label")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    encoder = Encoder.load(options.backbone)
    pairs = {"banking77": "snips", "snips": "banking77"}
    runs = [run(name, pairs[name], seed, options, encoder) for name in options.sets for seed in options.seeds]
    machine = {"date": datetime.now(UTC).date().isoformat(), "cpu": platform.processor(), "torch": torch.__version__}
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
