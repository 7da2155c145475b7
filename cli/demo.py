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

from bertology_serve.cli.common import note, table

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
QUESTIONS: tuple[dict[str, Any], ...] = (
    {"delta": "sentiment", "text": "The plot was simple, and I left the cinema smiling."},
    {"delta": "sentiment", "text": "Cold soup, rude waiter, never again."},
    {"delta": "intent", "text": "How much money do I have left this month?"},
    {"delta": "intent-probe", "text": "Wake me at half past six tomorrow."},
    {"delta": "entities", "text": "Ada Lovelace moved from London to Turin to work for Fiat."},
    {"delta": "similarity", "text": "A man plays the guitar.", "text_pair": "Somebody is making music."},
    {
        "delta": "answers",
        "question": "Where does the ferry leave?",
        "context": "The ferry leaves from pier four at noon. Tickets are sold on board.",
    },
    {"delta": "choice", "premise": "The glass fell.", "question": "effect", "choices": ["It broke.", "It sang."]},
    {"delta": "base", "text": "The bare encoder answers with a vector."},
)


def demo(
    out: Annotated[Path, typer.Option(help="Where deltas and the export go; what an earlier demo left is replaced.")]
    = Path("demo-run"),
) -> None:  # fmt: skip
    """Train one delta of each kind, serve them all in one mixed batch, export one merged. Minutes on two cores."""
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
        shown = json.dumps(QUESTIONS[:2])[1:-1]
        note(f"curl {url}/predict -d '[{shown}, ...]'")
        body = json.dumps(QUESTIONS).encode()
        began = time.perf_counter()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/predict", body), timeout=60) as reply:
            answers = json.loads(reply.read())
        took = time.perf_counter() - began
    rows = [[a["delta"], a["task"], _asked(q), _answer(a)] for q, a in zip(QUESTIONS, answers, strict=True)]
    table(f"{len(answers)} answers from one call in {1e3 * took:.0f} ms", ["delta", "task", "asked", "answer"], rows,
          stderr=False)  # fmt: skip


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


def _asked(question: dict[str, Any]) -> str:
    return " / ".join(str(value) for name, value in question.items() if name != "delta")


def _answer(answer: dict[str, Any]) -> str:
    """An answer in a few words."""
    if "entities" in answer:
        return ", ".join(f"{entity['text']} ({entity['label']})" for entity in answer["entities"]) or "none"
    if "answer" in answer:
        return f"{answer['answer']['text']!r} ({answer['answer']['score']:.2f})"
    if "embedding" in answer:
        vector = ", ".join(f"{value:.3f}" for value in answer["embedding"][:3])
        return f"[{vector}, ...] of {len(answer['embedding'])}"
    if "value" in answer:
        return f"{answer['value']:.2f}"
    return f"{answer.get('label', answer.get('choice'))} ({answer['score']:.2f})"


def _next(out: Path) -> list[str]:
    return [
        f"bertology-serve serve --backbone {MINILM} --deltas {out}/deltas --port 8000",
        "bertology-serve train --backbone minilm --task classification --method lora --train FILE --eval FILE "
        "--epochs 2 --out DIR",
        f"bertology-serve inspect {out}/deltas/sentiment",
        "bertology-serve --help",
    ]
