"""The first minutes on a GPU: is it right, how near is it to cuBLAS, and where does the time go.

    python benchmarks/gpu_first.py --out DIR [--limit 340] [--render]

Needs torch 2.9, Triton 3.5, transformers 5, numpy, and no model: weights are random. Every row is printed, and written
to ``DIR/gpu_first.jsonl``, as soon as it is measured; a step that fails is a row that says why; after ``--limit``
seconds no row is begun. ``--render`` makes ``gpu_first.md`` and ``gpu_first.png`` of the rows. ``--small --device cpu``
runs the same code in Triton's interpreter (set TRITON_INTERPRET=1), where times say nothing.

Seconds by arithmetic, on an H200: 25 for compiling in parallel, 5 for limits, 20 for correctness, 12 points of 6 for
the table, 8 of 3 for the bare product, 12 of 3 to take apart, 2 models of 30, 4 for training, 15 points of 4 for the
rest: 340.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import platform
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from bertology_serve.bench.kernels import gpu_timing, methods, row_kernels
from bertology_serve.bench.kernels.kernel_report import floor_ratio
from bertology_serve.bench.kernels.workload import Inputs, Workload, batch_segments, inputs
from bertology_serve.encoder.bank import BARE, BankEntry, DeltaBank
from bertology_serve.encoder.batch import make_plan, pack
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.kernels import dispatch, shrink_expand
from bertology_serve.kernels.columns import TileColumns, tile_columns
from bertology_serve.kernels.fused_lora_linear import fused_lora_linear
from bertology_serve.kernels.tuning import FUSED, SPLIT, TORCH, Config
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.kinds import effects, init
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import Encoding, TaskSpec

Row = dict[str, Any]
Call = Callable[[Inputs], Tensor]
SHAPES = ((768, 3072), (768, 768), (3072, 768), (768, 2304))  # BERT-base: up, output, down, the joined projections
TOKENS = (16384, 4096, 65536)
ALLOWED = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}
ENCODERS = {
    "bert-base": BertConfig(),
    "bert-large": BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}
TINY = {"small": BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)}
DELTAS, RANK, SEED = 64, 8, 0


@dataclass(frozen=True)
class Place:
    """Where it runs, and how much of it: ``small`` is the rehearsal."""

    device: torch.device
    small: bool

    @property
    def gpu(self) -> bool:
        """Whether times are those of a GPU."""
        return self.device.type == "cuda"

    def point(self, k: int, n: int, rows: int, rank: int = 16, deltas: int = 64) -> Workload:
        """A workload; a hundredth of it in the rehearsal."""
        if self.small:
            return Workload(64, 32 if n <= k else 48, min(64, rows // 64 + 1), rank, min(deltas, 4), dtype="float32")
        return Workload(k, n, rows, rank, deltas)

    def config(self, work: Workload) -> Config:
        """What dispatch would launch, or a tile that the interpreter finishes."""
        if self.small:
            return Config(16, 16, 32, 16, 1)
        path = methods.chosen(work, batch_segments(work), self.device)
        return path.config

    def form(self, work: Workload) -> str:
        """The form that dispatch picks."""
        return FUSED if self.small else methods.chosen(work, batch_segments(work), self.device).form

    def times(self, calls: Mapping[str, Call], sets: Sequence[Inputs]) -> dict[str, float]:
        """Microseconds a call, the median; calls take turns."""
        if self.gpu:
            return {name: spread.median for name, spread in gpu_timing.compare(calls, sets).items()}
        found = {}
        for name, call in calls.items():
            begin = time.perf_counter()
            call(sets[0])
            found[name] = 1e6 * (time.perf_counter() - begin)
        return found

    def sets(self, work: Workload) -> list[Inputs]:
        """As many sets of inputs as leave the cache cold."""
        first = inputs(work, self.device, 0)
        count = gpu_timing.sets_needed(first.bytes, self.device) if self.gpu else 1
        return [first, *(inputs(work, self.device, seed) for seed in range(1, count))]

    def synchronize(self) -> None:
        """Waits for the GPU, if there is one."""
        if self.gpu:
            torch.cuda.synchronize()


def lists(place: Place, work: Workload, config: Config, widest: int | None = None) -> TileColumns:
    """The column lists of a workload's batch; ``widest`` as a graph would have it."""
    columns = tile_columns([batch_segments(work)], work.rows, config.block_m).to(place.device)
    return columns if widest is None else replace(columns, widest=widest)


def fused(place: Place, work: Workload, config: Config, overfull: bool = False) -> Call:
    """One launch; ``overfull`` compiles in the loop over more columns than RT."""
    columns = lists(place, work, config, 1000 if overfull else None)
    return lambda i: fused_lora_linear(i.x, i.w, i.bias, i.pools, columns, "", config)


def split(place: Place, work: Workload, config: Config) -> Call:
    """Shrink, then the linear that reads it."""
    columns = lists(place, work, config)
    return lambda i: shrink_expand.split_lora_linear(i.x, i.w, i.bias, i.pools, columns, "", config)


def ours(place: Place, work: Workload) -> Call:
    """What dispatch would run."""
    form, config = place.form(work), place.config(work)
    if form == TORCH:
        return lambda i: dispatch.torch_linear(i.x, i.w, i.bias, i.pools, [batch_segments(work)])
    return (split if form == SPLIT else fused)(place, work, config)


def cublas(i: Inputs) -> Tensor:
    """The linear without deltas, by the vendor's library."""
    return F.linear(i.x, i.w, i.bias)


def compiled(place: Place) -> Iterator[Row]:
    """Every kernel of the table, compiled by eight processes at once into Triton's cache."""
    if not place.gpu:
        return
    works = [place.point(k, n, rows) for rows in TOKENS for k, n in SHAPES]
    with ProcessPoolExecutor(8, multiprocessing.get_context("spawn")) as pool:
        for work, seconds in zip(works, pool.map(_warm, works), strict=True):
            yield {"point": asdict(work), "seconds": seconds}


def _warm(work: Workload) -> float:
    place, begin = Place(torch.device("cuda"), False), time.perf_counter()
    given, config = inputs(work, place.device, 0), place.config(work)
    for call in (ours(place, work), methods.plain(config), fused(place, work, config), split(place, work, config)):
        call(given)
    place.synchronize()
    return time.perf_counter() - begin


@cache
def reached(device: torch.device) -> gpu_timing.Ceilings:
    """The limits of a GPU, measured once."""
    return gpu_timing.ceilings(device, torch.bfloat16)


def limits(place: Place) -> Iterator[Row]:
    """What this GPU reaches: one large product, one large copy."""
    if place.gpu:
        found = reached(place.device)
        yield {"tflops": found.flops / 1e12, "tbytes_per_s": found.bytes / 1e12}


def correct(place: Place) -> Iterator[Row]:
    """Each form against float64, at shapes that dispatch meets and at odd ones; then whole passes, and replays."""
    points = ((768, 768, 1), (768, 3072, 16384), (768, 768, 4096), (3072, 768, 4096), (768, 768, 5000))
    for k, n, rows in points[:2] if place.small else points:
        work = place.point(k, n, rows)
        given, config = inputs(work, place.device, 0), place.config(work)
        want = methods.exact(given, batch_segments(work), min(512, work.rows))
        calls = {"ours": ours(place, work), "fused": fused(place, work, config), "split": split(place, work, config),
                 "overfull": fused(place, work, config, overfull=True), "cublas pair": _pair(place, work)}  # fmt: skip
        for name, call in calls.items():
            error = float((call(given)[: len(want)].double() - want).norm() / want.norm())
            yield {"point": asdict(work), "name": name, "error": error, "right": error <= ALLOWED[given.x.dtype]}
    yield from _whole_passes(place)


def _whole_passes(place: Place) -> Iterator[Row]:
    """Four kinds and none in one batch of a random BERT: the kernels' pass, and its replay, beside torch's own."""
    config = TINY["small"] if place.small else replace_layers(ENCODERS["bert-base"], 2)
    on_cpu = random_encoder(config, torch.device("cpu"), torch.float32)
    kinds: list[list[Any]] = [
        [Lora(rank=8)],
        [Bitfit()],
        [Adapter(width=16)],
        [Lora(("query", "up"), rank=4), Bitfit()],
    ]
    work = texts(60 if place.small else 700)
    want = _hidden(on_cpu, work, kinds, torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16) if place.gpu else (torch.float32,):
        encoder = random_encoder(config, place.device, dtype)
        for name in ("eager", "replay", "replay of another batch") if place.gpu else ("eager",):
            if name == "replay":
                encoder.use_graphs()
            if "another" in name:
                _hidden(encoder, work[::-1], kinds, place.device)
            got = _hidden(encoder, work, kinds, place.device).double().cpu()
            error = float((got - want.double()).norm() / want.double().norm())
            yield {"name": f"whole pass, {name}", "dtype": str(dtype), "error": error,
                   "right": error <= (1e-4 if dtype == torch.float32 else 0.03)}  # fmt: skip


@torch.inference_mode()
def _hidden(encoder: Encoder, work: list[Encoding], kinds: list[list[Any]], device: torch.device) -> Tensor:
    bank = DeltaBank(encoder.anatomy, encoder.dtype, device)
    entries = [BARE, *(bank.add(f"d{i}", random_effects(encoder, specs)) for i, specs in enumerate(kinds))]
    batch = pack(work, [entries[i % len(entries)] for i in range(len(work))], encoder.anatomy, device)
    return encoder.run(batch, bank, make_plan(batch))


def table(place: Place) -> Iterator[Row]:
    """The goal: rank 16, 64 deltas, beside cuBLAS without deltas."""
    for rows in TOKENS[:1] if place.small else TOKENS:
        for k, n in SHAPES[:2] if place.small else SHAPES:
            work = place.point(k, n, rows)
            config = place.config(work)
            calls: dict[str, Call] = {
                "cublas": cublas, "own product": methods.plain(config), "ours": ours(place, work),
                "fused": fused(place, work, config), "split": split(place, work, config),
                "cublas pair": _pair(place, work),
            }  # fmt: skip
            yield from _ratios(place, work, calls, place.form(work), config)


def _pair(place: Place, work: Workload) -> Call:
    if not place.small:
        return methods.pair(work, batch_segments(work), place.device)
    config = Config(16, 16, 32, 16)
    columns = lists(place, work, config)

    def run(i: Inputs) -> Tensor:
        s = shrink_expand.segmented_lora_shrink(i.x, i.pools, columns, config)
        return shrink_expand.lora_expand(F.linear(i.x, i.w, i.bias), s, i.pools, columns, config)

    return run


def _ratios(place: Place, work: Workload, calls: dict[str, Call], form: str, config: Config) -> Iterator[Row]:
    sets = place.sets(work)
    times = place.times(calls, sets)
    floor = 1.0
    if place.gpu:
        floor = floor_ratio(work, batch_segments(work), reached(place.device), sets[0].x.element_size())
    for name, us in times.items():
        yield {"point": asdict(work), "name": name, "us": us, "ratio": us / times["cublas"], "floor": floor,
               "tflops": 2e-6 * work.rows * work.k * work.n / us, "form": form, "config": asdict(config)}  # fmt: skip


def product(place: Place) -> Iterator[Row]:
    """Our product alone, by tile: above 1.06 of cuBLAS no way of adding deltas reaches 1.10."""
    tiles = [
        Config(128, 128, 64, 16, 1, 4, 3, True), Config(128, 128, 64, 16, 1, 8, 3, True),
        Config(128, 256, 64, 16, 1, 8, 3, True), Config(128, 256, 64, 16, 1, 8, 3, True, persistent=True),
        Config(128, 128, 64, 16, 1, 8, 4, True, persistent=True), Config(64, 256, 64, 16, 1, 8, 4, True),
    ]  # fmt: skip
    points = ((768, 3072, 16384), (768, 768, 16384), (768, 3072, 4096), (768, 768, 4096))
    for k, n, rows in points[:1] if place.small else points:
        work = place.point(k, n, rows)
        calls: dict[str, Call] = {"cublas": cublas}
        for config in [replace(place.config(work), persistent=on) for on in (False, True)] if place.small else tiles:
            calls[brief(config)] = methods.plain(config)
        yield from _ratios(place, work, calls, "product", place.config(work))


def taken_apart(place: Place) -> Iterator[Row]:
    """Where the time of 768 x 3072 at 16,384 rows goes: ranks, the overfull loop, the shrink alone and in parts."""
    work = place.point(768, 3072, 16384)
    base = place.config(work)
    calls: dict[str, Call] = {"cublas": cublas, "no columns": methods.plain(base)}
    once = base if place.small else Config(128, 128, 64, 32, 1, 8, 3, True)
    for tile in (16,) if place.small else (16, 32, 64):
        calls[f"split RT {tile}"] = split(place, work, replace(base, rank_tile=tile))
    calls["split, not persistent"] = split(place, work, replace(base, persistent=False))
    calls["fused"] = fused(place, work, once)
    calls["fused, sweep 3"] = fused(place, work, replace(once, sweep=1 if place.small else 3))
    calls["fused, overfull loop compiled in"] = fused(place, work, once, overfull=True)
    for rows in (16384, 4096):
        some = place.point(768, 3072, rows)
        columns = lists(place, some, base)
        parts: dict[str, Call] = {"cublas": cublas}
        for splits in (1, 2) if place.small else (1, 2, 4, 6):
            parts[f"shrink alone, K in {splits}"] = _shrink(columns, base, splits)
        yield from _ratios(place, some, {**calls, **parts} if rows == 16384 else parts, "apart", base)


def brief(config: Config) -> str:
    """A configuration in a few words."""
    shape = f"{config.block_m}x{config.block_n} {config.warps} warps {config.stages} stages"
    return f"{shape}{', persistent' if config.persistent else ''}"


def _shrink(columns: TileColumns, config: Config, splits: int) -> Call:
    def run(i: Inputs) -> Tensor:
        return shrink_expand.segmented_lora_shrink(i.x, i.pools, columns, config, splits=splits)

    return run


def encoders(place: Place) -> Iterator[Row]:
    """Whole encoders: the time on the device by replays of one batch, and the host's time to prepare it, apart."""
    dtype = torch.bfloat16 if place.gpu else torch.float32
    for name, config in (TINY if place.small else ENCODERS).items():
        encoder = random_encoder(config, place.device, dtype)
        for tokens in (60,) if place.small else (4096, 15000):
            work = texts(tokens)
            bank = DeltaBank(encoder.anatomy, encoder.dtype, place.device)
            made = random_effects(encoder, [Lora(rank=RANK)])
            own = [bank.add(f"d{i}", made) for i in range(DELTAS)]
            about = {"encoder": name, "tokens": sum(map(len, work)), "sequences": len(work)}
            device_ms: dict[str, float] = {}
            for label, entries in (
                ("merged", [BARE] * len(work)), (f"{DELTAS} deltas", [own[i % DELTAS] for i in range(len(work))]),
            ):  # fmt: skip
                row = _one_pass(place, encoder, work, entries, bank)
                device_ms[label] = row["device_ms"]
                yield {**about, "name": label, **row, "ratio": row["device_ms"] / device_ms["merged"]}
            other = _peft(encoder, config, work)
            if other is not None:
                ms = _wall(place, other)
                yield {**about, "name": "peft adapter_names", "wall_ms": ms, "ratio": ms / device_ms["merged"]}


@torch.inference_mode()
def _one_pass(
    place: Place, encoder: Encoder, work: list[Encoding], entries: list[BankEntry], bank: DeltaBank
) -> dict[str, float]:
    def prepare() -> Any:
        batch = pack(work, entries, encoder.anatomy, place.device)
        return batch, make_plan(batch)

    batch, plan = prepare()
    host = _wall(place, prepare)
    encoder.graphs = None
    eager = _wall(place, lambda: encoder.run(batch, bank, plan))
    if not place.gpu:
        return {"host_ms": host, "eager_ms": eager, "device_ms": eager, "wall_ms": host + eager}
    encoder.use_graphs()
    wall = _wall(place, lambda: encoder.run(*_swapped(prepare(), bank)))
    graphs = encoder.graphs
    [recorded] = graphs._made.values() if graphs is not None else []
    device = gpu_timing.fastest(lambda: recorded._replay()) * 1e3
    encoder.graphs = None
    return {"host_ms": host, "eager_ms": eager, "device_ms": device, "wall_ms": wall}


def _swapped(prepared: tuple[Any, Any], bank: DeltaBank) -> tuple[Any, DeltaBank, Any]:
    return prepared[0], bank, prepared[1]


def _wall(place: Place, run: Callable[[], Any]) -> float:
    """Milliseconds by the clock, host work included: the median of ten, after two."""
    taken = []
    for _ in range(2 if place.small else 12):
        begin = time.perf_counter()
        run()
        place.synchronize()
        taken.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(taken[-10:])


def _peft(encoder: Encoder, config: BertConfig, work: list[Encoding]) -> Callable[[], Any] | None:
    """peft's mixed batch of eight adapters, padded as it arrives; ``None`` without peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = LoraConfig(r=RANK, target_modules=["query", "value"], init_lora_weights=False)
        wrapped = get_peft_model(BertModel(copy.deepcopy(config)), lora, adapter_name="d0")
        for i in range(1, 8):
            wrapped.add_adapter(f"d{i}", lora)
    wrapped.to(device=encoder.device, dtype=encoder.dtype).eval()
    longest = max(map(len, work))
    ids = torch.tensor([[*e.ids, *[0] * (longest - len(e))] for e in work], device=encoder.device)
    mask = torch.tensor([[1] * len(e) + [0] * (longest - len(e)) for e in work], device=encoder.device)
    names = [f"d{i % 8}" for i in range(len(work))]
    return torch.inference_mode()(lambda: wrapped(input_ids=ids, attention_mask=mask, adapter_names=names))


def training(place: Place) -> Iterator[Row]:
    """A step of LoRA, forward and backward, under autocast: by the kernels, and by torch alone."""
    config = TINY["small"] if place.small else ENCODERS["bert-base"]
    work = texts(60 if place.small else 4096)
    for name in ("kernels", "torch"):
        encoder = random_encoder(config, place.device, torch.float32)
        live = TrainableDelta(encoder, [Lora(rank=8, dropout=0.0)], TaskSpec("classification", ("a", "b")), SEED)
        known = dispatch.architecture
        if name == "torch":
            dispatch.architecture = lambda device: ("", "asked for")

        def step(live: TrainableDelta = live) -> None:
            with torch.autocast(place.device.type, dtype=torch.bfloat16, enabled=place.gpu):
                loss = live(work).float().square().mean()
            loss.backward()

        try:
            yield {"name": f"training step, {name}", "tokens": sum(map(len, work)), "wall_ms": _wall(place, step)}
        finally:
            dispatch.architecture = known


def rest(place: Place) -> Iterator[Row]:
    """Other numbers of deltas, other ranks, and the kernels that memory bounds."""
    kinds = ((1, 16), (8, 16), (1000, 16), (64, 4), (64, 8), (64, 32), (64, 64))
    for deltas, rank in kinds[:1] if place.small else kinds:
        work = place.point(768, 3072, 16384, rank, deltas)
        yield from _ratios(
            place, work, {"cublas": cublas, "ours": ours(place, work)}, place.form(work), place.config(work)
        )
    if place.gpu:
        for figure in row_kernels.measure(row_kernels.sweep(torch.bfloat16), place.device):
            yield {"point": {**asdict(figure.work), "dtype": "bfloat16"}, "name": figure.work.kernel,
                   "us": figure.times[row_kernels.OURS].median, "ratio": figure.ratio,
                   "error": figure.error}  # fmt: skip


STEPS: tuple[Callable[[Place], Iterator[Row]], ...] = (
    compiled, limits, correct, table, product, taken_apart, encoders, training, rest,
)  # fmt: skip


def random_encoder(config: BertConfig, device: torch.device, dtype: torch.dtype) -> Encoder:
    """A BERT with random weights, the same every time, and a tokenizer that knows no word."""
    torch.manual_seed(SEED)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]")))
    encoder = Encoder.of_model(BertModel(copy.deepcopy(config)), tokenizer, "random")
    encoder.model.to(device=device, dtype=dtype)
    encoder.prepack()
    return encoder


def replace_layers(config: BertConfig, layers: int) -> BertConfig:
    """The same encoder with fewer layers."""
    fewer = copy.deepcopy(config)
    fewer.num_hidden_layers = layers
    return fewer


def random_effects(encoder: Encoder, specs: list[Any]) -> Any:
    """What random tensors of these kinds change, small enough that answers stay comparable."""
    generator = torch.Generator().manual_seed(SEED)
    tensors = init(specs, encoder.anatomy, torch.Generator().manual_seed(SEED))
    for tensor in tensors.values():
        tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    return effects(specs, tensors, encoder.anatomy)


def texts(tokens: int) -> list[Encoding]:
    """Sequences of lognormal length (mean 24, at most 128) that have about so many tokens."""
    random = np.random.default_rng(SEED)
    found: list[Encoding] = []
    while sum(map(len, found)) < tokens:
        length = int(np.clip(random.lognormal(np.log(24) - 0.32, 0.8), 3, 128))
        found.append(Encoding(tuple(random.integers(1000, 20000, length).tolist()), (0,) * length))
    return found


def run(place: Place, out: Path, limit: float) -> None:
    """All steps in their order, row by row."""
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with (out / "gpu_first.jsonl").open("a", encoding="utf-8") as file:

        def tell(row: Row) -> None:
            row = {"at_s": round(time.monotonic() - begin, 2), **row}
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(_line(row), flush=True)

        tell({"step": "machine", **_machine(place)})
        for step in STEPS:
            rows = _guarded(step, place)
            for row in rows:
                tell({"step": step.__name__, **row})
                if time.monotonic() - begin > limit:
                    tell({"step": step.__name__, "stopped": f"after {limit:.0f} s, as --limit asks"})
                    return


def _guarded(step: Callable[[Place], Iterator[Row]], place: Place) -> Iterable[Row]:
    """A step's rows; where it fails, a last row that says why, and the next step goes on."""
    try:
        yield from step(place)
    except Exception as problem:
        yield {"failed": f"{type(problem).__name__}: {problem}", "trace": traceback.format_exc()[-2000:]}


def _machine(place: Place) -> Row:
    if place.gpu:
        return dict(gpu_timing.machine(place.device))
    return {"gpu": "none: a rehearsal", "torch": torch.__version__, "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def _line(row: Row) -> str:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
    point = shown.pop("point", None)
    if point:
        shown["point"] = " ".join(str(value) for value in point.values())
    for key in ("config", "trace"):
        shown.pop(key, None)
    return "  ".join(f"{key} {value}" for key, value in shown.items())


def render(out: Path) -> None:
    """``gpu_first.md`` and ``gpu_first.png`` of the rows in ``gpu_first.jsonl``."""
    rows = [json.loads(line) for line in (out / "gpu_first.jsonl").read_text(encoding="utf-8").splitlines()]
    [about, *_] = [row for row in rows if row["step"] == "machine"]
    parts = ["# First figures on a GPU", ", ".join(f"{k} {v}" for k, v in about.items() if k not in ("step", "at_s"))]
    for step in STEPS:
        mine = [row for row in rows if row["step"] == step.__name__]
        if mine:
            parts += [f"## {step.__name__.replace('_', ' ')}", (step.__doc__ or "").splitlines()[0], _table(mine)]
    (out / "gpu_first.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    _draw([row for row in rows if row["step"] == "table" and "ratio" in row], out / "gpu_first.png")


def _table(rows: list[Row]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("step", "config", "trace")))

    def cell(value: object) -> str:
        if isinstance(value, dict):
            return " ".join(map(str, value.values()))
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value).replace("|", "/")

    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return "\n".join([*lines, *("| " + " | ".join(cell(row.get(key)) for key in keys) + " |" for row in rows)])


def _draw(rows: list[Row], path: Path) -> None:
    """A panel for each shape: time ÷ cuBLAS over T."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((row["point"]["k"], row["point"]["n"]) for row in rows))
    if not shapes:
        return
    canvas = Figure(figsize=(3.6 * len(shapes), 3.6), dpi=150, layout="constrained")
    panels = canvas.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for panel, shape in zip(panels, shapes, strict=True):
        mine = [row for row in rows if (row["point"]["k"], row["point"]["n"]) == shape]
        for name in dict.fromkeys(row["name"] for row in mine):
            dots = sorted((row["point"]["rows"], row["ratio"]) for row in mine if row["name"] == name)
            panel.plot(*zip(*dots, strict=True), marker="o", label=name)
        panel.axhline(1.1, color="grey", linestyle=":")
        panel.set(title=f"K {shape[0]}, N {shape[1]}", xlabel="T, packed rows", xscale="log")
    panels[0].set_ylabel("time ÷ cuBLAS without deltas")
    panels[-1].legend(fontsize=7)
    canvas.savefig(path)


def main() -> None:
    """Measures, or renders what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--limit", type=float, default=340.0, help="seconds after which no row is begun")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="the rehearsal: a hundredth of it")
    parser.add_argument("--render", action="store_true", help="make tables and plots of the rows that are there")
    asked = parser.parse_args()
    if asked.render:
        render(asked.out)
        return
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --small --device cpu rehearses without one")
    run(Place(torch.device(asked.device), asked.small), asked.out, asked.limit)


if __name__ == "__main__":
    main()
