"""``bertology-serve demo``: the whole of it in a few minutes, on built-in examples and the packaged MiniLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bertology_serve.cli.ask import asked, shown
from bertology_serve.cli.common import load_library, note, table
from bertology_serve.errors import VerificationError

if TYPE_CHECKING:
    from bertology_serve.encoder.encoder import Encoder

MINILM = "minilm"


@dataclass(frozen=True)
class Lesson:
    """One delta of the demo: what it learns, from which built-in examples, and how."""

    name: str
    examples: str
    task: str
    method: str
    epochs: int
    pooling: str | None = None
    rate: float | None = None


LESSONS = (
    Lesson("sentiment", "sentiment", "classification", "lora", 5, "mean"),
    Lesson("intent", "intent", "classification", "bitfit", 6, "mean"),
    Lesson("entities", "entities", "token-classification", "adapter", 6),
    Lesson("similarity", "similarity", "regression", "prefix", 8, "mean"),
    Lesson("answers", "qa", "question-answering", "lora,bitfit", 12, rate=2e-3),
    Lesson("choice", "choice", "multiple-choice", "prompt", 5, "mean"),
    Lesson("intent-probe", "intent", "classification", "probe", 8, "mean"),
)
RIGHT: tuple[tuple[dict[str, Any], str | float | None], ...] = (
    ({"delta": "sentiment", "text": "The plot was simple, and I left the cinema smiling."}, "positive"),
    ({"delta": "sentiment", "text": "Cold soup, rude waiter, never again."}, "negative"),
    ({"delta": "intent", "text": "How much money do I have left this month?"}, "check_balance"),
    ({"delta": "intent-probe", "text": "Wake me at half past six tomorrow."}, "set_alarm"),
    (
        {"delta": "entities", "text": "Ada Lovelace moved from London to Turin to work for Fiat."},
        "[Ada Lovelace PER] moved from [London LOC] to [Turin LOC] to work for [Fiat ORG].",
    ),
    ({"delta": "similarity", "text": "A man plays the guitar.", "text_pair": "A man is playing a guitar."}, 3.0),
    (
        {
            "delta": "answers",
            "question": "Who repaired the roof?",
            "context": "The roof was repaired by Anna in May, before the rain.",
        },
        "Anna",
    ),
    ({"delta": "choice", "premise": "The glass fell.", "question": "effect", "choices": ["It broke.", "It sang."]},
     "It broke."),
    ({"delta": "base", "text": "The bare encoder answers with a vector."}, None),
)  # fmt: skip
"""Questions, and how the right answer begins; of a value from 0 to 5, the least that is right."""


def demo(
    out: Annotated[Path, typer.Option(help="Where deltas and the export go; what an earlier demo left is replaced.")]
    = Path("demo-run"),
) -> None:  # fmt: skip
    """Train one delta of each kind, serve them all in one mixed batch, export one merged. Minutes on two cores.

    Exit code 1 where an answer is wrong.
    """
    load_library()
    from bertology_serve.encoder.encoder import Encoder

    started = time.perf_counter()
    deltas = out / "deltas"
    encoder = Encoder.load(MINILM)
    _train(encoder, deltas)
    _serve(deltas)
    _export(encoder, deltas / "sentiment", out / "sentiment-onnx")
    note(f"\nall of it took {time.perf_counter() - started:.0f} s. What to type next:")
    for line in _next(out):
        note(f"  {line}")


def _train(encoder: Encoder, deltas: Path) -> None:
    from bertology_serve.examples import path
    from bertology_serve.tasks.registry import task_named
    from bertology_serve.training.batches import Source
    from bertology_serve.training.run_directory import Destination
    from bertology_serve.training.train import train
    from bertology_serve.training.train_config import TrainConfig

    rows = []
    for lesson in LESSONS:
        note(f"training {lesson.name}: {lesson.method} on {lesson.examples} ({lesson.task})")
        config = TrainConfig.of(
            task=lesson.task,
            method=tuple(lesson.method.split(",")),
            epochs=lesson.epochs,
            pooling=lesson.pooling,
            learning_rate=lesson.rate,
            batch_size=8,
            keep="last",  # a delta of each kind is to be shown, where "best" may leave the probe
        )
        place = Destination(deltas / lesson.name, overwrite=True)
        data = [Source.read(path(lesson.examples, split)) for split in ("train", "dev")]
        done = train(config, encoder, *data, place=place)
        metric = task_named(lesson.task).main_metric
        rows.append(
            [
                lesson.name,
                lesson.task,
                " + ".join(done.delta.kinds),
                f"{done.parameters.trained:,}",
                len(data[0].records),
                f"{metric} {done.delta.metrics[metric]:.3f}",
                f"{done.state.seconds:.1f} s",
            ]
        )
    table(
        "measured on examples held out",
        ["delta", "task", "kind", "parameters", "examples", "metric", "time"],
        rows,
        stderr=False,
    )


def _serve(deltas: Path) -> None:
    """The server in a process of its own, and one call with an item for every delta."""
    import urllib.request

    with serving(deltas) as url:
        questions = [question for question, _ in RIGHT]
        note(f"curl {url}/predict -d '[{json.dumps(questions[:2])[1:-1]}, ...]'")
        body = json.dumps(questions).encode()
        began = time.perf_counter()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/predict", body), timeout=60) as reply:
            answers = json.loads(reply.read())
        took = time.perf_counter() - began
    told = [shown(answer, question) for question, answer in zip(questions, answers, strict=True)]
    rows = [[a["delta"], a["task"], asked(q), text] for q, a, text in zip(questions, answers, told, strict=True)]
    table(f"{len(answers)} answers from one call in {1e3 * took:.0f} ms", ["delta", "task", "asked", "answer"], rows,
          stderr=False)  # fmt: skip
    wrong = [row for row, (_, right) in zip(rows, RIGHT, strict=True) if not is_right(row[-1], right)]
    if wrong:
        raise VerificationError(f"wrong answers: {'; '.join(f'{row[0]}: {row[2]} {row[3]}' for row in wrong)}")


def is_right(told: str, right: str | float | None) -> bool:
    """Whether an answer, as it is shown, is the one of ``RIGHT``."""
    return right is None or (told.startswith(right) if isinstance(right, str) else float(told) >= right)


@contextmanager
def serving(deltas: Path) -> Iterator[str]:
    """``bertology-serve serve`` on a free port; yields its address, and drains it afterwards."""
    command = [sys.executable, "-m", "bertology_serve", "serve", "--backbone", MINILM, "--deltas", str(deltas)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--drain-seconds", "0", "--log-level", "warning"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield _address(process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def _address(process: subprocess.Popen[str]) -> str:
    """The address that the server prints once it is ready; raises RuntimeError with what it said instead."""
    said = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if "ready after" in line:
            note(line.rstrip())
            return line.split()[-1]
    raise RuntimeError(f"the server did not start: {' '.join(said)[-500:]}")


def _export(encoder: Encoder, delta: Path, out: Path) -> None:
    from bertology_serve.encoder.opening import load_delta
    from bertology_serve.export.export_spec import ExportSpec
    from bertology_serve.export.exporting import export_delta

    note(f"bertology-serve export --merge {delta} --out {out}")
    done = export_delta(encoder, load_delta(delta, encoder), out, ExportSpec(merge=True, overwrite=True))
    note(done.report.line())
    note(f"{out}/onnx/model.onnx: {done.bytes / 1e6:.1f} MB")


def _next(out: Path) -> list[str]:
    return [
        f"bertology-serve serve --backbone {MINILM} --deltas {out}/deltas --port 8000",
        "bertology-serve train --backbone minilm --task classification --train FILE.csv --out DIR",
        f'bertology-serve ask {out}/deltas/sentiment "A text of your own."',
        f"bertology-serve inspect {out}/deltas/sentiment",
        "bertology-serve --help",
    ]
