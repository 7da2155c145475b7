"""This server and the alternatives under the same load, one after the other, round for round; and their memory."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import torch

from bertology_serve.bench.prove.cores import ONE_THREAD, across, resident_bytes
from bertology_serve.bench.prove.stage import Served, Stage, serving
from bertology_serve.bench.prove.traffic import closed, opened, percentile, predict
from bertology_serve.bench.serving.alternatives.bench_tasks import Made, make
from bertology_serve.bench.serving.load import Load, calls
from bertology_serve.bench.serving.wire import Wire
from bertology_serve.encoder.linear import pays
from bertology_serve.errors import SpecError, Unsupported, VerificationError

OURS, EIGHT_BITS = "ours", "8 bits"
CONTENDERS = {
    OURS: "bertology-serve",
    "peft": "peft's adapter_names, FastAPI",
    "pipelines": "a merged pipeline per task, FastAPI",
    "sessions": "a merged ONNX session per task, FastAPI",
    f"{OURS}, bf16": "bertology-serve, bf16",
    f"{OURS}, {EIGHT_BITS}": "bertology-serve, 8 bits",
    f"sessions, {EIGHT_BITS}": "a merged ONNX session per task, 8 bits, FastAPI",
}
"""Those of float32 first; bf16 only where it is faster here."""
PRECISIONS = {"bf16": "bf16", EIGHT_BITS: "int8-row"}
NEEDS = ("fastapi", "peft", "onnxruntime")
AS_LARGE = ("--max-batch-ms", "1000", "--max-batch-tokens", "1024")  # batches as the others': they know no latency
AGREE, NEARLY = 1e-3, 0.05
"""What scores may differ by in float32, and in fewer bits."""
TEXTS = ("the river bank was very cold", "a great film", "good")


@dataclass(frozen=True)
class Plan:
    """``tasks`` are asked by ``clients`` at once, and then at ``share`` of what the slowest can answer; ``rounds`` of
    ``seconds`` each. Memory is looked at with ``many`` tasks too. ``different`` merged models are made, see ``make``.
    """

    tasks: int = 8
    many: int = 32
    rounds: int = 5
    seconds: float = 10.0
    clients: int = 32
    share: float = 0.5
    different: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.different <= self.tasks <= self.many:
            raise SpecError(f"tasks is {self.tasks}; expected {self.different} to {self.many}")
        if self.rounds < 1 or self.seconds <= 0 or self.clients < 1 or not 0 < self.share < 1:
            raise SpecError("rounds, seconds and clients: expected numbers above 0; share: one between 0 and 1")


@dataclass(frozen=True)
class Row:
    """One server: texts a second and CPU milliseconds a text when it is saturated, percentiles at equal load, memory in
    bytes with few and with many tasks. Medians over the rounds. ``key`` is that of ``CONTENDERS``."""

    key: str
    name: str
    texts_s: float
    cpu_ms: float
    p50_ms: float
    p99_ms: float
    bytes_few: int
    bytes_many: int


@dataclass(frozen=True)
class Compared:
    """``rate`` are the calls a second of the equal load; ``pinned`` says whether servers and client had a core each."""

    rows: list[Row]
    rate: float
    pinned: bool

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def draw(found: Compared, path: Path) -> None:
    """Bars: texts a second, percentiles at equal load, memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    FigureCanvasAgg(figure)
    names = [row.name for row in found.rows]
    panels: list[tuple[str, list[tuple[str, str, list[float]]]]] = [
        ("texts a second, saturated", [("", "black", [row.texts_s for row in found.rows])]),
        (
            f"milliseconds at {found.rate:.0f} texts/s",
            [
                ("p99", "tab:red", [row.p99_ms for row in found.rows]),
                ("p50", "tab:green", [row.p50_ms for row in found.rows]),
            ],
        ),
        (
            "memory, MB",
            [
                ("many tasks", "0.7", [row.bytes_many / 2**20 for row in found.rows]),
                ("few", "black", [row.bytes_few / 2**20 for row in found.rows]),
            ],
        ),
    ]
    for place, (title, series) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        for label, colour, values in series:
            place.barh(names, values, color=colour, label=label)
        place.set_title(title, fontsize=9)
        place.invert_yaxis()
        if len(series) > 1:
            place.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def missing() -> list[str]:
    """What is not installed and needed."""
    return [name for name in NEEDS if importlib.util.find_spec(name) is None]


def compare(stage: Stage, plan: Plan, advance: Callable[[], None] = lambda: None) -> Compared:
    """Checks that all answer alike, then measures. Unsupported where something is not installed; VerificationError
    where answers differ."""
    if absent := missing():
        raise Unsupported(f"{', '.join(absent)} not installed; pip install 'bertology-serve[bench,cpu]'")
    directory = stage.directory / "alternatives"
    few = make(stage, directory, plan.tasks, plan.different)
    with started(stage, few) as servers:
        asyncio.run(_agree(servers, plan.different))
        with across([served.pid for served in servers.values()]) as pinned:
            texts, cpu = asyncio.run(_saturated(servers, plan, advance))
            rate = plan.share * min(map(median, texts.values()))
            p50, p99 = asyncio.run(_at(servers, rate, plan, advance))
        small = {name: resident_bytes(served.pid) for name, served in servers.items()}
    with started(stage, make(stage, directory, plan.many, plan.different)) as servers:
        large = {name: asyncio.run(_memory(served, plan.many)) for name, served in servers.items()}
    advance()
    rows = [
        Row(
            name,
            CONTENDERS[name],
            median(texts[name]),
            median(cpu[name]),
            median(p50[name]),
            median(p99[name]),
            small[name],
            large[name],
        )
        for name in texts
    ]
    return Compared(rows, rate, pinned)


@contextmanager
def started(stage: Stage, made: Made) -> Iterator[dict[str, Served]]:
    """All of the servers with those tasks; they start side by side."""
    keys = [key for key in CONTENDERS if not key.endswith("bf16") or pays(torch.bfloat16)]
    with ExitStack() as stack, ThreadPoolExecutor(len(keys)) as pool:
        yield dict(zip(keys, pool.map(lambda key: stack.enter_context(start(stage, key, made)), keys), strict=True))


@contextmanager
def start(stage: Stage, key: str, made: Made) -> Iterator[Served]:
    """One of the servers with those tasks, and one thread for its model."""
    name, _, bits = key.partition(", ")
    if name == OURS:
        precision = ("--precision", PRECISIONS[bits]) if bits else ()
        with stage.server(made.deltas, *AS_LARGE, *precision, environ=ONE_THREAD) as served:
            yield served
        return
    module = "bertology_serve.bench.serving.alternatives.fastapi_app"
    command = [sys.executable, "-m", module, key, str(made.directory), str(made.base), str(made.count)]
    with serving(command, ONE_THREAD) as served:
        yield served
        stage.served_cpu += served.cpu


async def _agree(servers: Mapping[str, Served], different: int) -> None:
    answers = {}
    for name, served in servers.items():
        async with Wire(served.url) as wire:
            replies = [await wire.send(predict(f"d{n}", TEXTS)) for n in range(different)]
        found = [one for reply in replies for one in msgspec.json.decode(reply.body)]
        answers[name] = [(one["label"], one["score"]) for one in found]
    for name, found in answers.items():
        most = NEARLY if ", " in name else AGREE
        for (label, score), (expected, right) in zip(found, answers[OURS], strict=True):
            tied = most == NEARLY and right <= 0.5 + most  # two labels may be as good
            if (label != expected and not tied) or not abs(score - right) <= most:
                raise VerificationError(
                    f"{CONTENDERS[name]} answers {label} {score:.4f}, {CONTENDERS[OURS]} {expected} {right:.4f}; "
                    "nothing was timed"
                )


async def _saturated(
    servers: Mapping[str, Served], plan: Plan, advance: Callable[[], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Texts a second, and CPU milliseconds a text, of each round."""
    texts: dict[str, list[float]] = {name: [] for name in servers}
    cpu: dict[str, list[float]] = {name: [] for name in servers}
    for served in servers.values():
        await closed(served.url, calls(_load(plan)), plan.clients, plan.seconds / 5)
    for turn in range(plan.rounds):
        for name, served in servers.items():
            before, started = served.cpu, time.perf_counter()
            found = (await closed(served.url, calls(_load(plan, turn)), plan.clients, plan.seconds)).count
            texts[name].append(found / (time.perf_counter() - started))
            cpu[name].append(1e3 * (served.cpu - before) / found)
        advance()
    return texts, cpu


async def _at(
    servers: Mapping[str, Served], rate: float, plan: Plan, advance: Callable[[], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The median and the 99th percentile, in milliseconds, of each round."""
    p50: dict[str, list[float]] = {name: [] for name in servers}
    p99: dict[str, list[float]] = {name: [] for name in servers}
    for turn in range(plan.rounds):
        for name, served in servers.items():
            found = await opened(served.url, calls(_load(plan, turn)), rate, plan.seconds, turn)
            p50[name].append(1e3 * percentile(found.answered, 0.5))
            p99[name].append(1e3 * percentile(found.answered, 0.99))
        advance()
    return p50, p99


def _load(plan: Plan, seed: int = 0) -> Load:
    """Mixed lengths over the tasks, all asked alike."""
    return Load(deltas=plan.tasks, zipf=0.0, seed=seed)


async def _memory(served: Served, tasks: int) -> int:
    """After every task was asked."""
    async with Wire(served.url) as wire:
        for number in range(tasks):
            await wire.send(predict(f"d{number}", TEXTS))
    return resident_bytes(served.pid)
