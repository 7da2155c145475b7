"""Compiles kernels ahead of time for GPUs that are not there, in a process of its own, and reads the machine code.

``python -m tests.kernels.compiling`` compiles every configuration of the committed tables and prints what each takes.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bertology_serve.kernels import tuning
from bertology_serve.kernels.shrink_expand import k_splits
from bertology_serve.kernels.tuning import SPLIT, Config, adapter_config

ROOT = Path(__file__).parents[2]
BIN = Path("backends", "nvidia", "bin")
INSTRUCTIONS = ("HGMMA", "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR", "HMMA", "UTMALDG", "LDL", "STL", "FFMA")


@dataclass(frozen=True)
class Job:
    """One compilation: a kernel of a module, its constants, and the types of its other arguments.

    Arguments without a type in ``types`` are pointers to ``dtype`` where no other is said.
    """

    label: str
    arch: int
    module: str
    kernel: str
    constants: dict[str, Any]
    types: dict[str, str]
    dtype: str = "bf16"
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Report:
    """What the compiler's resource report and the disassembly say of one kernel."""

    label: str
    registers: int
    stack: int
    shared: int
    counts: dict[str, int] = field(default_factory=dict)
    loops: tuple[dict[str, int], ...] = ()
    """The same counts for every innermost loop of the machine code."""

    warps: int = 4

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.counts["LDL"] or self.counts["STL"])

    @property
    def programs(self) -> int:
        """How many of its programs a multiprocessor of Hopper holds, by registers (in eights) and shared memory."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(65536 // registers, 228 * 1024 // (self.shared + 1024))

    @property
    def serialised(self) -> bool:
        """Whether wgmma instructions wait for one another: each has an arrive, or a main loop has more than one wait.

        ptxas says so as C7514; a loop that is almost never taken is enough to make it.
        """
        waits = (loop["WARPGROUP.DEPBAR"] for loop in self.loops if loop["HGMMA"])
        together = self.counts["WARPGROUP.ARRIVE"] < self.counts["HGMMA"]
        return bool(self.counts["HGMMA"]) and not (together and all(count == 1 for count in waits))


def linear_job(
    arch: int, config: Config, dtype: str, slices: int, lora: int, splits: int = 1, overflow: bool = False
) -> Job:
    """The fused linear (lora 1), its epilogue form (2) or the plain one (0) in one configuration."""
    tma = config.tma
    constants = {
        "LORA": lora, "SLICES": slices, "HAS_BIAS": True, "ACTIVATION": "", "BIAS": 1.0,
        "BM": config.block_m, "BN": config.block_n, "BK": config.block_k, "RT": config.rank_tile,
        "SWEEP": config.sweep, "EVEN_K": True, "SPLITS": splits, "OVERFLOW": overflow,
        "PERSISTENT": config.persistent, "TMA": tma, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "PDL": lora == 2 and arch >= 90, "GROUP": 8, "stride_wk": 1,
    }  # fmt: skip
    types = dict.fromkeys(("starts", "rows", "ranges"), "*i32")
    types |= {"coefficients": "*fp32"} if splits > 1 else {}
    types |= dict.fromkeys(
        ("T", "width", "K", "capacity", "stride_x", "stride_wn", "stride_y", "stride_a", "stride_b"), "i32"
    )
    if tma:
        types["x"] = f"tensordesc<{dtype}[{config.block_m}, {config.block_k}]>"
        types["w"] = f"tensordesc<{dtype}[{config.block_n}, {config.block_k}]>"
    shape = "x".join(map(str, (config.block_m, config.block_n, config.block_k)))
    label = (
        f"sm_{arch} linear lora {lora} {dtype} {shape} RT{config.rank_tile} sweep {config.sweep} slices {slices} "
        f"{config.warps} warps {config.stages} stages {splits} splits"
        f"{' tma' if tma else ''}{' overflow' if overflow else ''}"
    )
    where = "bertology_serve.kernels.fused_lora_linear"
    return Job(label, arch, where, "fused_lora_linear_kernel", constants, types, dtype, config.warps, config.stages)


def shrink_job(arch: int, config: Config, dtype: str, splits: int = 1, slices: int = 3, overflow: bool = False) -> Job:
    """The separate shrink in one configuration."""
    constants = {
        "SLICES": slices, "BIAS": 1.0, "BM": config.block_m, "BK": config.block_k, "RT": config.rank_tile,
        "EVEN_K": True, "OVERFLOW": overflow, "PRECISION": "ieee" if dtype == "fp32" else "tf32", "PDL": arch >= 90,
    }  # fmt: skip
    types = dict.fromkeys(("starts", "rows", "ranges"), "*i32") | ({"out": "*fp32"} if splits > 1 else {})
    types |= dict.fromkeys(("T", "K", "span", "capacity", "stride_x", "stride_a"), "i32")
    label = (
        f"sm_{arch} shrink {dtype} {config.block_m}x{config.block_k} RT{config.rank_tile} slices {slices} "
        f"{config.stages} stages{' splits' if splits > 1 else ''}{' overflow' if overflow else ''}"
    )
    where = "bertology_serve.kernels.shrink_expand"
    return Job(label, arch, where, "shrink_kernel", constants, types, dtype, 4, config.stages)


def bottleneck_job(arch: int, dtype: str) -> Job:
    """The bottleneck adapters as they are launched at H = 768."""
    config = adapter_config(dtype != "fp32")
    constants = {
        "ACTIVATION": "gelu", "BM": config.block_m, "BN": config.block_n, "BK": config.block_k,
        "RT": config.rank_tile, "EVEN_K": True, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    types = dict.fromkeys(("starts", "rows", "ranges"), "*i32")
    types |= dict.fromkeys(("T", "H", "stride_r", "stride_s", "width"), "i32")
    where = "bertology_serve.kernels.bottleneck"
    label = f"sm_{arch} bottleneck {dtype} {config.block_m}x{config.block_n}x{config.block_k} RT{config.rank_tile}"
    return Job(label, arch, where, "bottleneck_kernel", constants, types, dtype, config.warps, config.stages)


def row_jobs(arch: int, dtype: str) -> list[Job]:
    """The kernels without matrix instructions, at H = 768: LayerNorm, pool gradients."""
    integers = dict.fromkeys(("starts", "rows", "ranges", "sources", "position_of", "type_of"), "*i32")
    integers |= dict.fromkeys(("firsts", "counts", "begins", "order", "tiles"), "*i32")
    integers |= dict.fromkeys(("T", "H", "W", "stride_x", "stride_r", "stride_z"), "i32") | {"eps": "fp32"}
    constants: dict[str, dict[str, Any]] = {
        "layernorm.layer_norm_kernel": {"HAS_RESIDUAL": True, "HAS_BIAS": True, "DELTAS": True, "BM": 4, "BH": 1024},
        "autograd.pool_gradient_kernel": {"BM": 128, "BW": 64},
    }
    jobs = []
    for name, values in constants.items():
        module, kernel = name.split(".")
        types = integers | ({"out": "*fp32"} if module == "autograd" else {})
        where = f"bertology_serve.kernels.{module}"
        jobs.append(Job(f"sm_{arch} {kernel} {dtype}", arch, where, kernel, values, types, dtype))
    return jobs


def shipped(arch: int) -> Iterator[Job]:
    """Every distinct compilation that the committed table of an architecture asks for where no tile is overfull."""
    seen = set()
    for row in tuning.table(f"sm_{arch}").rows:
        point, config = row.point, row.config
        dtype = "bf16" if point.dtype == "half" else "fp32"
        lora = 0 if point.columns == 0 else 2 if row.form == SPLIT else 1
        splits = 1
        if lora == 2:
            splits = k_splits(tuning.cdiv(point.rows, config.block_m) * point.slices, point.k, config.block_k)
        jobs = [linear_job(arch, config, dtype, point.slices, lora, splits)]
        jobs += [shrink_job(arch, config, dtype, splits, point.slices)] if lora == 2 else []
        for job in jobs:
            if job.label not in seen:
                seen.add(job.label)
                yield job


def others(arch: int) -> list[Job]:
    """The kernels that no table configures."""
    return [*(bottleneck_job(arch, dtype) for dtype in ("bf16", "fp32")), *row_jobs(arch, "bf16")]


def heaviest(arch: int) -> list[Job]:
    """Of everything shipped, the compilations that need most registers: per tile shape the most ranks and slices."""
    weight: dict[tuple[Any, ...], tuple[int, int]] = {}
    kept: dict[tuple[Any, ...], Job] = {}
    for job in shipped(arch):
        c = job.constants
        lora = c.get("LORA")
        if lora == 0 or (lora != 1 and job.dtype == "fp32"):
            continue  # the plain linear is part of the others, and fp32 is light
        family = (job.kernel, lora, job.dtype, c["BM"] if lora == 1 else 0, lora == 1 and c["SWEEP"] > 1)
        mine = (c["BM"] * c.get("BN", 1) * c.get("SWEEP", 1) * c["RT"], c["SLICES"])
        if mine > weight.get(family, (0, 0)):
            weight[family], kept[family] = mine, job
    return list(kept.values())


def compiled(jobs: Iterable[Job]) -> list[Report]:
    """Compiles in a fresh process with a fresh cache."""
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}
        run = subprocess.run(
            [sys.executable, "-m", "tests.kernels.compiling", "-"], cwd=ROOT, env=env, capture_output=True, text=True,
            input=json.dumps([asdict(job) for job in jobs]),
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [Report(**json.loads(line)) for line in run.stdout.splitlines()]


def compile_here(job: Job) -> Report:
    """Compiles one kernel in this process, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    signature = {}
    for name in kernel.arg_names:
        signature[name] = "constexpr" if name in job.constants else job.types.get(name, "*" + job.dtype)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name != "T")
    }
    source = ASTSource(kernel, signature, constexprs=job.constants, attrs=aligned)
    options = {"num_warps": job.warps, "num_stages": job.stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _cuobjdump(triton, "--dump-resource-usage", file.name)
        code = _cuobjdump(triton, "--dump-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    shared = binary.metadata.shared
    return Report(job.label, int(found[1]), int(found[2]), shared, _counts(code), _innermost_loops(code), job.warps)


def _counts(code: str) -> dict[str, int]:
    return {name: len(re.findall(rf"\b{re.escape(name)}\b", code)) for name in INSTRUCTIONS}


def _innermost_loops(code: str) -> tuple[dict[str, int], ...]:
    """What lies between a backward branch and its target, where no other such pair lies within."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", code)]
    branches = ((at, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for at, text in lines)
    loops = [(int(found[1], 16), at) for at, found in branches if found and int(found[1], 16) < at]
    inner = [one for one in loops if not any(one != o and one[0] <= o[0] and o[1] <= one[1] for o in loops)]
    return tuple(_counts("\n".join(text for at, text in lines if lo <= at <= hi)) for lo, hi in inner)


def _cuobjdump(triton: Any, what: str, path: str) -> str:
    tool = Path(triton.__file__).parent / BIN / "cuobjdump"
    return subprocess.run([tool, what, path], capture_output=True, text=True, check=True).stdout


def main(arguments: list[str]) -> None:
    """Reports on the jobs that stand on stdin ("-"), or on everything shipped."""
    if arguments == ["-"]:
        for job in json.load(sys.stdin):
            print(json.dumps(asdict(compile_here(Job(**job)))))
        return
    for arch in (80, 90):
        for job in [*shipped(arch), *others(arch)]:
            r = compile_here(job)
            counts = " ".join(f"{name} {count}" for name, count in r.counts.items() if count)
            print(
                f"{r.label}: REG {r.registers} STACK {r.stack} shared {r.shared} programs {r.programs} {counts}"
                f"{' SPILLS' if r.spills else ''}{' SERIALISED' if r.serialised else ''}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
