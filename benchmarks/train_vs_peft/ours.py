"""A delta trained and measured by bertology-serve."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.train_vs_peft.clock import Clock
from benchmarks.train_vs_peft.works import BATCH, OPTIONS, STRIDE, Work
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.tasks.spec import QUESTION_ANSWERING
from bertology_serve.training.batches import Source
from bertology_serve.training.evaluation import evaluate
from bertology_serve.training.run_directory import Destination
from bertology_serve.training.train import train
from bertology_serve.training.train_config import TrainConfig


def ours(work: Work, backbone: str, **flags: Any) -> dict[str, Any]:
    """Metrics, tokens, seconds of the steps and their processor seconds; ``flags`` are further ones of train's."""
    asked = work.known.task == QUESTION_ANSWERING
    config = TrainConfig.of(
        work.known.task, (work.method,), epochs=work.epochs, batch_size=BATCH, learning_rate=work.rate,
        head_learning_rate=work.rate, max_length=work.max_length, seed=work.seed, keep="last",
        options={work.method: OPTIONS[work.method]}, labels=work.labels, stride=STRIDE if asked else None,
        **{"start": "random", "pooling": "cls", "head": "hf", **flags},  # as peft's runs have it
    )  # fmt: skip
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        place = Destination(Path(folder) / "delta")
        outcome = train(config, Encoder.load(backbone), Source("train", work.train), place=place, watcher=clock)
        lines = [json.loads(line) for line in (outcome.path / "log.jsonl").read_text().splitlines()]
    found = evaluate(outcome.delta, work.dev, Encoder.load(backbone))
    tokens = sum(line["tokens"] for line in lines if "tokens" in line)
    metrics = work.official(found.answers)
    return {"metrics": metrics, "tokens": tokens, "seconds": outcome.state.seconds, "cpu": clock.seconds}
