"""``bench load``: calls that come as they come, whether or not those before were answered; more and more of them."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bertology_serve.bench.prove.stage import WORDS, ZOO, Stage
from bertology_serve.bench.prove.traffic import Outcomes, opened, percentile, predict
from bertology_serve.errors import SpecError, Unsupported
from bertology_serve.export.installation import environment

SHARES = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "p99.9_ms": 0.999}
BURST = 8.0  # calls that come together in bursty arrivals, on average
TEXTS = 256


@dataclass(frozen=True)
class Load:
    """``rates`` in calls a second, each for ``seconds``; every call is one text for one of ``deltas`` deltas.

    Deltas are asked as Zipf has it: the k-th as often as ``k ** -zipf``. Lengths in words are lognormal with ``mean``.
    """

    rates: tuple[float, ...] = (10.0, 20.0, 40.0, 80.0)
    seconds: float = 10.0
    arrivals: Literal["poisson", "bursty"] = "poisson"
    deltas: int = 32
    zipf: float = 1.1
    mean: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0 or self.seconds <= 0 or self.deltas < 1 or self.mean < 1:
            raise SpecError("rates, seconds, deltas and mean: expected numbers above 0")
        if not 0 <= self.zipf <= 10:
            raise SpecError(f"zipf is {self.zipf}; expected 0 (all alike) to 10")


@dataclass(frozen=True)
class Point:
    """One rate: what was offered, what was answered and refused (a second), and percentiles of the answers' time."""

    offered: float
    answered: float
    refused: float
    broken: int
    milliseconds: dict[str, float]


def run(backbone: str, load: Load, directory: Path, advance: Callable[[], None] = lambda: None) -> list[Point]:
    """A server in a process of its own, with one random delta after the other of the zoo's kinds."""
    stage = Stage(backbone, directory, quick=True)
    root = directory / "load"
    for number, like in zip(range(load.deltas), itertools.cycle(ZOO), strict=False):
        stage.save(root, f"d{number}", "1", number, like)
    with stage.server(root) as served:
        ask = calls(load)
        asyncio.run(opened(served.url, ask, min(load.rates), 1.0))
        points = []
        for rate in load.rates:
            burst = BURST if load.arrivals == "bursty" else 1.0
            found = asyncio.run(opened(served.url, ask, rate, load.seconds, load.seed, burst=burst))
            points.append(point(rate, load.seconds, found))
            advance()
    return points


def calls(load: Load) -> Callable[[], bytes]:
    """Gives one call after the other."""
    draw = random.Random(load.seed)
    weights = [number**-load.zipf for number in range(1, load.deltas + 1)]
    spread = 0.6
    middle = math.log(load.mean) - spread**2 / 2
    texts = [
        " ".join(draw.choices(WORDS, k=max(1, min(40, round(draw.lognormvariate(middle, spread))))))
        for _ in range(TEXTS)
    ]
    return lambda: predict(f"d{draw.choices(range(load.deltas), weights)[0]}", draw.choice(texts))


def point(rate: float, seconds: float, found: Outcomes) -> Point:
    """What came of one rate."""
    times = {name: 1e3 * percentile(found.answered, share) for name, share in SHARES.items()}
    return Point(rate, len(found.answered) / seconds, len(found.refused) / seconds, found.broken, times)


def as_dict(backbone: str, load: Load, points: Sequence[Point]) -> dict[str, Any]:
    """The whole result, ready for JSON."""
    return {
        "benchmark": "load",
        "backbone": backbone,
        "load": asdict(load),
        "environment": environment(),
        "points": [asdict(one) for one in points],
    }


def check_plot(path: Path | None) -> None:
    """SpecError, or Unsupported without matplotlib; before the work, not after it."""
    if path is None:
        return
    if path.suffix != ".png":
        raise SpecError(f"cannot draw {path}: expected a name that ends in .png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Unsupported("--plot needs matplotlib: pip install 'bertology-serve[plots]'") from None


def draw(points: Sequence[Point], path: Path) -> None:
    """The saturation curve: answered over offered calls, and percentiles of their time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    offered = [one.offered for one in points]
    left.plot(offered, offered, color="0.8", linestyle="--")
    left.plot(offered, [one.answered for one in points], color="black", marker="o", label="answered")
    left.set_xlabel("offered calls/s")
    left.set_ylabel("answered calls/s")
    right = left.twinx()
    for name, colour in zip(("p50_ms", "p90_ms", "p99_ms"), ("tab:green", "tab:orange", "tab:red"), strict=True):
        right.plot(offered, [one.milliseconds[name] for one in points], color=colour, marker=".", label=name[:-3])
    right.set_yscale("log")
    right.set_ylabel("milliseconds")
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=120)
