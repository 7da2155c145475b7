"""The table of the README: deltas of several kinds on real data with MiniLM, each beside a linear probe.

    python benchmarks/minilm_table.py [--only sst2,mrpc] [--fresh]

Data: the folder that BERTOLOGY_DATA names, or ../shared/data. Each run is made once and kept in
``results/minilm_table.json``, so that the script can be stopped and called again; ``results/minilm_table.md`` is
written anew each time. The last state of a run is measured, never the best; the settings come from a few trial runs
on the same data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import bertology_serve
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.training.config import TrainConfig
from bertology_serve.training.destination import Destination
from bertology_serve.training.sources import Source
from bertology_serve.training.train import train

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DATA = Path(os.environ.get("BERTOLOGY_DATA", HERE.parent.parent / "shared" / "data"))
EVERY_LINEAR = ("query", "key", "value", "output", "up", "down")


@dataclass(frozen=True)
class Set:
    """One data set: what is trained on it, and what is reported. ``rows`` of the training file are drawn at random."""

    name: str
    task: str
    metric: str
    measured: str
    delta: Mapping[str, Any]
    probe: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None
    seeds: tuple[int, ...] = (0,)
    majority: bool = False


_WIDE = {"lora": {"targets": EVERY_LINEAR, "rank": 16, "alpha": 32.0}}
SETS = (
    Set("stsb", "regression", "spearman", "dev", {"method": "lora", "epochs": 2}, {"epochs": 2}),
    Set("wnut17", "token-classification", "f1", "dev", {"method": "lora", "epochs": 3}, {"epochs": 3}),
    Set("copa", "multiple-choice", "accuracy", "dev", {"method": "lora", "epochs": 8}, {"epochs": 8}, seeds=(0, 1, 2)),
    Set("sst2", "classification", "accuracy", "dev", {"method": "lora", "epochs": 2}, {"epochs": 2}, rows=4000),
    Set("mrpc", "classification", "accuracy", "dev", {"method": "lora", "epochs": 3}, {"epochs": 3}, majority=True),
    Set(
        "squad",
        "question-answering",
        "f1",
        "dev",
        {"method": "lora", "epochs": 1, "learning_rate": 2e-3, "options": _WIDE},
        {"epochs": 1},
    ),
    Set(
        "banking77",
        "classification",
        "accuracy",
        "test",
        {
            "method": "lora",
            "epochs": 6,
            "learning_rate": 1.5e-3,
            "schedule": "cosine",
            "pooling": "mean",
            "head": "linear",
            "options": _WIDE,
        },
        {"epochs": 3},
    ),
)


def main() -> None:
    """Makes what is missing, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="names of data sets, with commas")
    parser.add_argument("--fresh", action="store_true", help="make runs again that are in the results")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "minilm_table.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    only = [name for name in arguments.only.split(",") if name]
    for one in SETS:
        if only and one.name not in only:
            continue
        for key, config in runs(one):
            if arguments.fresh or key not in found or not same(found[key]["config"], config):
                found[key] = measured(one, config)
                path.write_text(json.dumps(found, indent=1) + "\n")
                print(key, found[key]["metrics"], f"{found[key]['seconds']:.0f} s", flush=True)
    (RESULTS / "minilm_table.md").write_text(table(found))
    print(table(found))


def runs(one: Set) -> Iterator[tuple[str, TrainConfig]]:
    """The runs of a data set by their keys: delta and probe, each seed."""
    for side, values in (("delta", one.delta), ("probe", {"method": "probe", **one.probe})):
        for seed in one.seeds:
            yield f"{one.name}/{side}/{seed}", TrainConfig(one.task, seed=seed, keep="last", **values)


def plain(config: TrainConfig) -> Any:
    """A configuration as JSON gives it back."""
    return json.loads(json.dumps(config.as_dict()))


def same(stored: Mapping[str, Any], config: TrainConfig) -> bool:
    """Whether a result's configuration is this one; fields that are newer than the result had their defaults."""
    return plain(TrainConfig.from_dict(stored)) == plain(config)


def measured(one: Set, config: TrainConfig) -> dict[str, Any]:
    """Trains one run in a temporary folder; its facts."""
    source, dev = (Source.read(DATA / one.name / f"{split}.jsonl.gz") for split in ("train", one.measured))
    if one.rows:
        source = Source(source.name, random.Random(0).sample(list(source.records), one.rows))
    with tempfile.TemporaryDirectory() as folder:
        outcome = train(config, Encoder.load("minilm"), source, dev, place=Destination(Path(folder) / one.name))
    return {
        "config": plain(config),
        "metrics": dict(outcome.delta.metrics),
        "rows": len(source.records),
        "measured_rows": len(dev.records),
        "trained_parameters": outcome.parameters.trained,
        "majority": majority(dev) if one.majority else None,
        "seconds": round(outcome.state.seconds, 1),
        "hardware": f"{processor()}, {torch.get_num_threads()} threads",
        "versions": f"bertology-serve {bertology_serve.__version__}, torch {torch.__version__}",
        "date": datetime.now(UTC).date().isoformat(),
    }


def majority(source: Source) -> float:
    """The share of the most frequent label."""
    labels = Counter(record.fields["label"] for record in source.records)
    return max(labels.values()) / len(source.records)


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.processor() or platform.machine()


def table(found: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| data | rows | method | parameters | metric | probe | delta | gain | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    shown = [one for one in SETS if all(key in found for key, _ in runs(one))]
    for one in shown:
        delta, probe = ([found[f"{one.name}/{side}/{seed}"] for seed in one.seeds] for side in ("delta", "probe"))
        values = [[run["metrics"][one.metric] * 100 for run in side] for side in (delta, probe)]
        gain = statistics.mean(values[0]) - statistics.mean(values[1])
        below = f" (majority {delta[0]['majority'] * 100:.1f})" if one.majority else ""
        lines.append(
            f"| {one.name} | {delta[0]['rows']:,} | {method(delta[0]['config'])} | {delta[0]['trained_parameters']:,} "
            f"| {one.metric}, {one.measured} ({delta[0]['measured_rows']:,} rows) | {mean(values[1])}{below} "
            f"| {mean(values[0])} | {gain:+.1f} | {sum(run['seconds'] for run in delta):.0f} s |"
        )
    facts = sorted({f"{run['hardware']}; {run['versions']}; {run['date']}" for run in found.values()})
    notes = "Seed 0, or mean ± standard deviation of as many seeds as are named. " + " · ".join(facts) + "."
    return "\n".join([*lines, "", notes, ""])


def method(config: Mapping[str, Any]) -> str:
    """``lora (rank 16), 3 epochs, lr 1e-3``, from what was given."""
    options = [f"{name} {_listed(value)}" for own in config["options"].values() for name, value in own.items()]
    head = f"{config['pooling']} pooling" if config["pooling"] else ""
    rate = f"lr {config['learning_rate']:g}" if config["learning_rate"] else ""
    parts = [f"{config['epochs']} epochs", rate, head, *options]
    return "+".join(config["method"]) + ", " + ", ".join(part for part in parts if part)


def _listed(value: Any) -> str:
    return "/".join(value) if isinstance(value, list | tuple) else str(value)


def mean(values: list[float]) -> str:
    """``81.5``, or ``81.5 ± 0.4 (3 seeds)``."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)} seeds)"


if __name__ == "__main__":
    main()
