"""Linear probes of every layer from one pass over a data set, solved for a path of C, beside the pass alone.

    DATA=../shared/data/ag_news; python benchmarks/lp_layers.py --train $DATA/train.jsonl.gz --eval $DATA/test.jsonl.gz

Both begin with tokenised records and an encoder in memory. The pass reads the last layer's rows and solves nothing; the
probes' time holds a pass of its own, features on disk, and the choice of C on the evaluation records. Rounds take turns
in which comes first; reported are the medians, and of the ratios, in processor seconds: neighbours do not count. The
objective reached is compared with scikit-learn's at its tightest, at C = 1 on the last layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression

import bertology_serve
from bertology_serve.data.records import read_records
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.tasks.logistic import Logistic
from bertology_serve.training.batches import Source
from bertology_serve.training.frozen_rows import pooled
from bertology_serve.training.probe_solver import Solver
from bertology_serve.training.recipes import stages
from bertology_serve.training.run_directory import RunDirectory
from bertology_serve.training.train import Prepared, prepare
from bertology_serve.training.train_config import TrainConfig

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measures, and writes one JSON object."""
    asked = _asked()
    train, dev = (Source(path.name, read_records(path, {"text": asked.column})) for path in (asked.train, asked.eval))
    train = Source(train.name, train.records[: asked.rows])
    encoder = Encoder.load(asked.backbone)
    prepacked = encoder.prepack()
    config = stages(TrainConfig.of("classification", recipe="lp", lp_layers="all"))[0].config
    ready = prepare(config, encoder, train, dev)
    rounds = [measured(ready, config, number) for number in range(asked.rounds)]
    found = {
        "data": f"{asked.train.parent.name}, {len(train.records):,} rows, {len(dev.records):,} to choose C on",
        "layers": encoder.anatomy.layers + 1,
        "prepacked": prepacked,
        **_medians(rounds),
        "optimum": against_sklearn(ready, config),
        "versions": f"bertology-serve {bertology_serve.__version__}, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(json.dumps(found))
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--eval", required=True, type=Path)
    parser.add_argument("--column", default="text_a")
    parser.add_argument("--rows", type=int, help="at most so many of the training data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "lp_layers.json")
    return parser.parse_args()


def measured(ready: Prepared, config: TrainConfig, number: int) -> dict[str, float]:
    """Processor seconds of the pass and of the probes, in one order or the other."""
    work = {"pass": lambda: one_pass(ready, config), "probes": lambda: probes(ready, config)}
    order = ("pass", "probes") if number % 2 else ("probes", "pass")
    times = {name: seconds(work[name]) for name in order}
    print(times, flush=True)
    return times


def seconds(call: Callable[[], Any]) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def _medians(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    ratios = [one["probes"] / one["pass"] for one in rounds]
    times = {name: round(statistics.median(one[name] for one in rounds), 2) for name in ("pass", "probes")}
    return {**times, "ratio": round(statistics.median(ratios), 3), "ratios": [round(ratio, 3) for ratio in ratios]}


def one_pass(ready: Prepared, config: TrainConfig) -> None:
    """The training and the evaluation records through the encoder, once."""
    pooled(ready.live, [*ready.items, *ready.dev], [ready.live.encoder.anatomy.layers], config.machine.max_tokens)


def probes(ready: Prepared, config: TrainConfig) -> None:
    """A probe a layer, from an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder) / "delta")
        directory.open({}, {}, resume=False)
        Solver(ready.live, ready.task, ready.items, config, ready.dev, directory).run()


def against_sklearn(ready: Prepared, config: TrainConfig) -> dict[str, float]:
    """The objective at C = 1 on the last layer: ours, and scikit-learn's."""
    depth = ready.live.encoder.anatomy.layers
    rows = pooled(ready.live, ready.items, [depth], config.machine.max_tokens)[depth]
    labels = torch.tensor([item.target for item in ready.items])
    x = rows.double()
    ours = Logistic(rows, torch.nn.functional.one_hot(labels).double()).solve(1.0).loss
    z = ((x - x.mean()) / x.std(correction=0)).numpy()
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(z, labels.numpy())
    logits = torch.from_numpy(model.decision_function(z))
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    return {"ours": ours, "sklearn": loss + float((model.coef_**2).sum()) / (2 * len(labels))}


if __name__ == "__main__":
    main()
