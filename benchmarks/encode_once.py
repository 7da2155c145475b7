"""One text, seven deltas: the batch that shares its rows beside one pass of the encoder and beside seven merged models.

    python benchmarks/encode_once.py [--backbone minilm] [--engine torch|onnx] [--precision fp32] \
        [--output benchmarks/results/encode_once.json]

One thread. Contenders take turns; what counts is the processor time of the process, and ratios are medians over rounds
of the ratio within each. Memory is what a fresh process holds (RSS) once it has answered, less what the libraries
take. The merged models are what
``export --merge`` writes, one session of ONNX Runtime for each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from bertology_serve.bench.serving.texts_workload import Workload, texts
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder import pipeline as pipelines
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import export_delta
from bertology_serve.export.installation import environment
from bertology_serve.export.onnx_engine import OnnxEngine, OnnxModel
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.encoding import encode_text
from bertology_serve.tasks.spec import CLASSIFICATION, TaskSpec

TASKS, TOKENS, WARM = 7, 64, 3
SPEC = TaskSpec(CLASSIFICATION, ("no", "yes"), pooling="mean", head="linear")
RESULTS = Path(__file__).parent / "results"


def deltas(encoder: Encoder) -> dict[str, list[Delta]]:
    """Seven random deltas of each sort, by its name."""
    depth = encoder.depth
    sorts: dict[str, tuple[Lora, ...]] = {
        "probe": (),
        "upper third": (Lora(layers=tuple(range(depth - depth // 3, depth))),),
        "all layers": (Lora(),),
    }
    return {
        sort: [_random(encoder, f"{sort.replace(' ', '-')}-{i}", specs, i) for i in range(TASKS)]
        for sort, specs in sorts.items()
    }


def _random(encoder: Encoder, name: str, specs: tuple[Lora, ...], seed: int) -> Delta:
    live, draw = TrainableDelta(encoder, specs, SPEC, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.normal_(0.0, 0.02, generator=draw)
    return live.freeze(name, "1")


def engine_of(made: Pipeline, engine: str, precision: Any) -> None:
    """What runs the batches."""
    if engine == "onnx":
        made.engine = onnx = OnnxEngine(made.encoder, precision)
        onnx.prepare_fork(made.encoder.depth - made.encoder.depth // 3)
    else:
        made.encoder.prepack()


def merged(encoder: Encoder, found: list[Delta], folder: Path) -> list[Path]:
    """Each delta as a model of its own."""
    for number, delta in enumerate(found):
        export_delta(encoder, delta, folder / str(number), ExportSpec(merge=True))
    return [folder / str(number) for number in range(len(found))]


def contenders(given: argparse.Namespace, folder: Path) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    encoder = Encoder(given.backbone)
    found = deltas(encoder)
    made = Pipeline(encoder, [delta for several in found.values() for delta in several])
    engine_of(made, given.engine, given.precision)
    text = texts(Workload(1, 1, TOKENS - 1, TOKENS), encoder.tokenizer)[0]
    mixed = texts(Workload(32, TASKS), encoder.tokenizer)
    models = [OnnxModel.open(path) for path in merged(encoder, found["upper third"], folder)]
    encodings = made.prepare(Request("base", {"text": text})).encodings

    def asked(names: list[str], own: list[str]) -> Callable[[], object]:
        jobs = [made.prepare(Request(name, {"text": one})) for name, one in zip(names, own, strict=True)]
        return lambda: made.run(jobs)

    apart = asked([found["all layers"][i % TASKS].name for i in range(32)], mixed)

    def unshared() -> None:
        def pack(encodings: Any, entries: Any, depth: int, pack: Any) -> Any:
            batch = pack(encodings, entries)
            return batch, sorted(range(batch.sequences), key=batch.order.__getitem__)

        with mock.patch.object(pipelines, "share", pack):
            apart()

    return {
        "one pass, no delta": asked(["base"], [text]),
        **{
            f"{TASKS} of {sort}": asked([delta.name for delta in several], [text] * TASKS)
            for sort, several in found.items()
        },
        f"{TASKS} merged ONNX sessions": lambda: [model.outputs(encodings) for model in models],
        "32 texts, nothing shared": apart,
        "32 texts, without looking for equal ones": unshared,
    }


def rounds(calls: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Milliseconds of processor time of each round."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM + count):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn >= WARM:
                taken[name].append(1e3 * (time.process_time() - start))
    return taken


def resident() -> float:
    """MiB that this process holds."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def holds(given: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """MiB of a fresh process with the seven tasks, beyond what it holds with its libraries alone."""
    with tempfile.TemporaryDirectory() as folder:
        encoder = Encoder(given.backbone)
        found = deltas(encoder)["upper third"]
        merged(encoder, found, Path(folder) / "merged")
        for number, delta in enumerate(found):
            delta.save(Path(folder) / "deltas" / str(number) / "1", encoder)
        for side in ("ours", "merged"):
            command = [sys.executable, __file__, "--backbone", given.backbone, "--engine", given.engine,
                       "--precision", given.precision, "--holds", side, "--folder", folder]  # fmt: skip
            yield side, float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def hold(given: argparse.Namespace) -> float:
    """What ``holds`` starts."""
    import onnxruntime  # noqa: F401  # both sides hold the libraries
    import transformers  # noqa: F401

    text, before = "a text of some words " * 8, resident()
    if given.holds == "ours":
        encoder = Encoder(given.backbone)
        made = Pipeline(encoder)
        for path in sorted((given.folder / "deltas").iterdir()):
            made.add(encoder.read_delta(path / "1"))
        engine_of(made, given.engine, given.precision)
        names = [name for name in made.deltas if name != "base"]
        made.ask_many(names, text)
    else:
        models = [OnnxModel.open(path) for path in sorted((given.folder / "merged").iterdir())]
        for model in models:
            model.outputs([encode_text(model.tokenizer, text, None, 128)])
    return resident() - before


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--engine", choices=("torch", "onnx"), default="torch")
    parser.add_argument("--precision", choices=("fp32", "int8-row"), default="fp32")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--holds", choices=("ours", "merged"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.holds:
        print(hold(given))
        return
    with tempfile.TemporaryDirectory() as folder:
        taken = rounds(contenders(given, Path(folder)), given.rounds)
    ratios = {
        name: median(a / b for a, b in zip(taken[name], taken[other], strict=True))
        for name, other in [
            *((f"{TASKS} of {sort}", "one pass, no delta") for sort in ("probe", "upper third", "all layers")),
            (f"{TASKS} merged ONNX sessions", f"{TASKS} of upper third"),
            ("32 texts, nothing shared", "32 texts, without looking for equal ones"),
        ]
    }
    memory = dict(holds(given))
    for name, values in taken.items():
        print(f"{name:45} {median(values):8.2f} ms" + (f"   × {ratios[name]:.3f}" if name in ratios else ""))
    print(f"memory: ours {memory['ours']:.0f} MiB, {TASKS} merged sessions {memory['merged']:.0f} MiB")
    if given.output:
        found = {"environment": environment(), "backbone": Path(given.backbone).name, "engine": given.engine,
                 "precision": given.precision, "ms": taken, "ratios": ratios, "mib": memory}  # fmt: skip
        given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
