"""Linear probes of every layer from one pass over a data set, solved for a path of C, beside the pass alone.

    python benchmarks/lp_layers.py --train train.jsonl.gz --eval test.jsonl.gz [--rounds 3] [--out FILE.json]

The pass is that of the features of one layer, nothing solved. Rounds take turns, in processor seconds; what is reported
is the median of the ratios. The objective reached is compared with scikit-learn's at C = 1 on the last layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bertology_serve.data.records import read_records
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.training.config import TrainConfig
from bertology_serve.training.features import pooled
from bertology_serve.training.logistic import Logistic
from bertology_serve.training.rundir import RunDirectory
from bertology_serve.training.solve import Solver
from bertology_serve.training.sources import Source
from bertology_serve.training.train import Prepared, prepare


def main() -> None:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--eval", required=True, type=Path)
    parser.add_argument("--column", default="text_a")
    parser.add_argument("--most", type=int, help="rows of the training data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    train, dev = (Source(path.name, read_records(path, {"text": asked.column})) for path in (asked.train, asked.eval))
    train = Source(train.name, train.records[: asked.most])
    encoder = Encoder.load(asked.backbone)
    found: dict[str, Any] = {"prepacked": encoder.prepack(), "rows": len(train.records), "eval_rows": len(dev.records)}
    config = TrainConfig("classification", recipe="lp", lp_layers="all")
    made, times = prepare(config, encoder, train, dev), {"pass": [], "probes": []}
    for _ in range(asked.rounds):
        times["pass"].append(seconds(lambda: one_pass(made, config)))
        times["probes"].append(seconds(lambda: solved(made, config)))
    ratios = [b / a for a, b in zip(times["pass"], times["probes"], strict=True)]
    found |= {name: round(statistics.median(values), 2) for name, values in times.items()}
    found |= {"ratio": round(statistics.median(ratios), 3), "ratios": [round(ratio, 3) for ratio in ratios]}
    found |= {"optimum": against_sklearn(made, config), "threads": torch.get_num_threads()}
    print(json.dumps(found))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = clock()
    call()
    return clock() - start


def clock() -> float:
    """Seconds of the processor that this process used, so that neighbours do not count."""
    return time.process_time()


def one_pass(made: Prepared, config: TrainConfig) -> None:
    """The pass over training and evaluation data, one layer's rows kept."""
    depth = made.live.encoder.anatomy.layers
    for items in (made.items, made.dev):
        pooled(made.live, items, [depth], config.max_tokens)


def solved(made: Prepared, config: TrainConfig) -> None:
    """The recipe ``lp`` on all layers, features included, from an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder) / "delta")
        directory.open({}, {}, resume=False)
        Solver(made.live, made.task, made.items, config, made.dev, directory).run()


def against_sklearn(made: Prepared, config: TrainConfig) -> dict[str, float]:
    """The objective at C = 1 on the last layer: ours, and scikit-learn's at its tightest."""
    from sklearn.linear_model import LogisticRegression

    depth = made.live.encoder.anatomy.layers
    rows = pooled(made.live, made.items, [depth], config.max_tokens)[depth]
    labels = torch.tensor([item.target for item in made.items])
    classes, x = int(labels.max()) + 1, rows.double()
    ours = Logistic(rows, labels, classes).solve(1.0).loss
    z = ((x - x.mean()) / x.std(correction=0)).numpy()
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(z, labels.numpy())
    logits = torch.from_numpy(model.decision_function(z))
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    return {"ours": ours, "sklearn": loss + float((model.coef_**2).sum()) / (2 * len(labels))}


if __name__ == "__main__":
    main()
