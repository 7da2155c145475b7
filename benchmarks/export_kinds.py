"""Deltas of every kind, trained on the packaged MiniLM and the built-in examples, exported and compared with torch.

    python benchmarks/export_kinds.py [--steps 12] [--back-ends direct,torch] [--methods "full;lora,bitfit"]
        [--backbone DIR]

Each is merged, what cannot be folded baked, and the file compared with the torch engine on the delta unmerged: the
verifier's own inputs, in every shape, and the records of the kind's examples. Writes one Markdown table to stdout and
stops at the first file that the verifier refuses.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from bertology_serve.data.records import load_examples
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.opening import open_delta
from bertology_serve.examples import path
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import Exported, export_delta
from bertology_serve.export.installation import environment
from bertology_serve.tasks.registry import task_for
from bertology_serve.training.batches import Source
from bertology_serve.training.run_directory import Destination
from bertology_serve.training.train import train
from bertology_serve.training.train_config import TrainConfig

KINDS = (
    ("lora", "sentiment", "classification"),
    ("bitfit", "intent", "classification"),
    ("lora,bitfit", "similarity", "regression"),
    ("adapter", "entities", "token-classification"),
    ("prompt", "sentiment", "classification"),
    ("prefix", "qa", "question-answering"),
    ("prompt,prefix,lora", "choice", "multiple-choice"),
    ("ia3", "sentiment", "classification"),
    ("norms", "sentiment", "classification"),
    ("probe", "intent", "classification"),
    ("full", "sentiment", "classification"),
    ("mixout", "sentiment", "classification"),
    ("child-tuning", "sentiment", "classification"),
    ("top-k", "sentiment", "classification"),
)
"""Method, examples, task."""


def exported(
    method: str, examples: str, task: str, steps: int, back_end: str, directory: Path, backbone: str
) -> Exported:
    """One delta trained for ``steps`` steps and exported; trained once for all back ends."""
    delta = directory / "delta"
    if not delta.exists():
        config = TrainConfig.of(
            task=task, method=tuple(method.split(",")), max_steps=steps, batch_size=8, start="random"
        )
        data = [Source.read(path(examples, split)) for split in ("train", "dev")]
        train(config, Encoder.load(backbone), *data, place=Destination(delta))
    loaded, encoder = open_delta(delta, None)
    own = task_for(loaded.task)
    records = [own.encode(one, encoder.tokenizer) for one in load_examples(path(examples, "dev"), own, labelled=False)]
    spec = ExportSpec(merge=True, bake=True, back_end=back_end)  # type: ignore[arg-type]
    return export_delta(encoder, loaded, directory / back_end, spec, records=records)


def rows(steps: int, back_ends: list[str], methods: list[str], backbone: str) -> Iterator[tuple[str, Exported]]:
    """A table's line for each kind and back end."""
    for method, examples, task in [row for row in KINDS if not methods or row[0] in methods]:
        with tempfile.TemporaryDirectory() as temporary:
            for back_end in back_ends:
                done = exported(method, examples, task, steps, back_end, Path(temporary), backbone)
                report = done.report
                lost = (report.lost or {}).get("bfloat16")
                agreement = "-" if report.agreement is None else f"{report.agreement:.2%}"
                yield (
                    (
                        f"| {method} | {task} | {back_end} | {report.sequences} | {report.largest:.1e} | {agreement} | "
                        f"{report.neighbours:.1e} | {'-' if lost is None else f'{lost:.1%}'} |"
                    ),
                    done,
                )


def main() -> None:
    """Trains, exports, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--back-ends", default="direct,torch")
    parser.add_argument("--methods", default="", help="only these, with semicolons between")
    parser.add_argument("--backbone", default="minilm")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    where = environment()
    print(f"{where['cpu']}; torch {where['versions']['torch']}, onnxruntime {where['versions']['onnxruntime']}; "
          f"{asked.steps} steps of training each; {where['date'][:10]}\n")  # fmt: skip
    print(
        "| method | task | back end | sequences | max \\|Δ\\| | decisions as torch | neighbours change | bf16 loses |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    worst = 0.0
    methods = asked.methods.split(";") if asked.methods else []
    for line, done in rows(asked.steps, asked.back_ends.split(","), methods, asked.backbone):
        print(line, flush=True)
        worst = max(worst, done.report.largest)
    print(f"\nlargest difference: {worst:.1e}")


if __name__ == "__main__":
    main()
