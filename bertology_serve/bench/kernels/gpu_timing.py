"""Timing on a GPU: CUDA graphs of many calls over rotating inputs, replayed in turns with what they are compared to."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Set = TypeVar("Set")
Call = Callable[[Set], Tensor]
Stream: Callable[[], Any] = torch.cuda.Stream
Event: Callable[..., Any] = torch.cuda.Event
CALLS, FEWER_CALLS, REPLAYS, LEAST_SETS, MOST_SETS = 20, 4, 12, 4, 64
SLOW_US = 5000.0
MATMUL, COPY_BYTES = 8192, 1 << 30


@dataclass(frozen=True)
class Spread:
    """Microseconds for one call: 20th percentile, median, 80th percentile; ``warm``: median over one input set only."""

    low: float
    median: float
    high: float
    warm: float


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches: FLOP/s of a large matrix product, bytes/s of a large copy (read plus written)."""

    flops: float
    bytes: float


def sets_needed(one: int, device: torch.device) -> int:
    """How many input sets of so many bytes make more than twice the L2 cache, 4 to 64."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, max(LEAST_SETS, 2 * cache // max(1, one) + 1))


def compare(calls: Mapping[str, Call[Set]], sets: Sequence[Set]) -> dict[str, Spread]:
    """Times every call in turns: replay by replay, A B C A B C, so that a drift of the clock meets all alike."""
    cold = {name: _graph(call, sets) for name, call in calls.items()}
    warm = {name: _graph(call, sets[:1]) for name, call in calls.items()}
    found: dict[str, list[list[float]]] = {name: [[], []] for name in calls}
    for _ in range(REPLAYS):
        for name in calls:
            for list_, (graph, count) in zip(found[name], (cold[name], warm[name]), strict=True):
                list_.append(_replay(graph) / count)
    return {name: _spread(*lists) for name, lists in found.items()}


def _spread(cold: list[float], warm: list[float]) -> Spread:
    cuts = statistics.quantiles(cold, n=5)
    return Spread(cuts[0], statistics.median(cold), cuts[3], statistics.median(warm))


def _graph(call: Call[Set], sets: Sequence[Set]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A captured graph of at least 20 calls (4 where one takes 5 ms or more), and their number."""
    stream = Stream()
    with torch.cuda.stream(stream):
        for one in sets:
            call(one)
        stream.synchronize()
        begin = time.perf_counter()
        call(sets[0])
        stream.synchronize()
        slow = (time.perf_counter() - begin) * 1e6 > SLOW_US
    count = max(len(sets), FEWER_CALLS if slow else CALLS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(count):
            call(sets[number % len(sets)])
    graph.replay()
    torch.cuda.synchronize()
    return graph, count


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay."""
    begin, end = Event(enable_timing=True), Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures both ceilings once."""
    a, b = (torch.randn(MATMUL, MATMUL, device=device).to(dtype) for _ in range(2))
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    product = fastest(lambda: torch.mm(a, b))
    copy = fastest(lambda: target.copy_(source))
    return Ceilings(2 * MATMUL**3 / product, 2 * COPY_BYTES / copy)


def fastest(work: Callable[[], Tensor]) -> float:
    """Seconds, the median of ten."""
    taken = []
    for _ in range(12):
        begin, end = Event(enable_timing=True), Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        taken.append(float(begin.elapsed_time(end)) / 1e3)
    return statistics.median(taken[2:])


def machine(device: torch.device) -> dict[str, str]:
    """GPU, driver, versions and date: what stands beside every figure."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
