"""Whole encoders on a GPU: 64 LoRA deltas in one packed batch beside the merged model, peft, and ever more residents.

    python benchmarks/gpu_model.py [--dtype float16] [--out benchmarks/results/gpu_model.json]

BERT-base and BERT-large with random weights, sequences of lognormal length (mean 24, at most 128), rank 8 on query and
value. *merged* is the same engine, batch and graphs with no delta: what a merged model costs on cuBLAS linears.
Contenders take turns; times are medians, host work included. ``--small --device cpu`` tries the script itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel

import bertology_serve
from bertology_serve.encoder.bank import BARE, BankEntry, DeltaBank
from bertology_serve.encoder.batch import make_plan, pack
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.kinds.kinds import effects, init
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import Encoding

SIZES = {
    "bert-base": BertConfig(),
    "bert-large": BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}
SMALL = {"small": BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)}
DELTAS, RANK, SEED = 64, 8, 0
RESIDENT = (64, 1000, 10_000)


def main() -> None:
    """Measures every size and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 4096, 15000])
    parser.add_argument("--small", action="store_true", help="a model of two layers, to try the script")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_model.json"))
    asked = parser.parse_args()
    found = {"environment": environment(asked.device), "dtype": asked.dtype, "runs": []}
    for name, config in (SMALL if asked.small else SIZES).items():
        encoder = make_encoder(config, name, asked.device, getattr(torch, asked.dtype))
        for tokens in asked.tokens:
            found["runs"] += [
                {"model": name, **row} for row in measured(encoder, config, tokens, asked.rounds, asked.small)
            ]
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text(json.dumps(found, indent=1) + "\n")


def make_encoder(config: BertConfig, name: str, device: str, dtype: torch.dtype) -> Encoder:
    """An encoder with random weights; there is nothing to tokenise."""
    torch.manual_seed(SEED)
    encoder = Encoder.of_model(BertModel(copy.deepcopy(config)), None, name)
    encoder.model.to(device=torch.device(device), dtype=dtype)
    encoder.prepack()
    return encoder


def workload(tokens: int) -> list[Encoding]:
    """Sequences of lognormal length that have about so many tokens."""
    random = np.random.default_rng(SEED)
    found: list[Encoding] = []
    while sum(map(len, found)) < tokens:
        length = int(np.clip(random.lognormal(np.log(24) - 0.32, 0.8), 3, 128))
        found.append(Encoding(tuple(random.integers(1000, 20000, length).tolist()), (0,) * length))
    return found


def resident(encoder: Encoder, count: int) -> tuple[DeltaBank, list[BankEntry]]:
    """A bank with so many LoRA deltas, A and B random."""
    bank = DeltaBank(encoder.anatomy, encoder.dtype, encoder.device)
    specs = [Lora(rank=RANK)]
    tensors = init(specs, encoder.anatomy, torch.Generator().manual_seed(SEED))
    for name, tensor in tensors.items():
        if name.endswith(".b"):
            tensor.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(SEED))
    made = effects(specs, tensors, encoder.anatomy)
    return bank, [bank.add(f"d{i}", made) for i in range(count)]


def measured(encoder: Encoder, config: BertConfig, tokens: int, rounds: int, small: bool) -> list[dict[str, Any]]:
    """One row a contender; ratios are to the merged model with graphs, where there are graphs."""
    work = workload(tokens)
    owners = [i % DELTAS for i in range(len(work))]
    contenders: dict[str, Callable[[], Any]] = {}
    bank, entries = resident(encoder, DELTAS)
    for graphs in (False, True):
        if graphs and encoder.device.type != "cuda":
            continue
        suffix = ", graphs" if graphs else ""
        contenders[f"merged{suffix}"] = passes(encoder, work, [BARE] * len(work), bank, graphs)
        contenders[f"ours{suffix}"] = passes(encoder, work, [entries[i] for i in owners], bank, graphs)
    for count in RESIDENT[:2] if small else RESIDENT:
        bank_of, some = resident(encoder, count)
        contenders[f"ours, {count} resident"] = passes(
            encoder, work, [some[i * count // DELTAS] for i in owners], bank_of, False
        )
    other = peft_pass(encoder, config, work, owners)
    if other is not None:
        contenders["peft adapter_names"] = other
    times = clock(contenders, rounds, encoder.device)
    base = statistics.median(times.get("merged, graphs", times["merged"]))
    rows = []
    for name, spent in times.items():
        middle = statistics.median(spent)
        row = {"contender": name, "tokens": sum(map(len, work)), "ms": middle, "ratio": middle / base, "rounds": spent}
        print(f"{encoder.name:12} {row['tokens']:6} tokens  {name:28} {middle:9.3f} ms  {row['ratio']:.3f}", flush=True)
        rows.append(row)
    return rows


def passes(
    encoder: Encoder, work: list[Encoding], entries: list[BankEntry], bank: DeltaBank, graphs: bool
) -> Callable[[], Any]:
    """Packing, planning and the forward pass of one batch."""

    @torch.inference_mode()
    def run() -> Any:
        batch = pack(work, entries, encoder.anatomy, encoder.device)
        return encoder.run(batch, bank, make_plan(batch))

    if not graphs:
        return run
    encoder.use_graphs()
    own, encoder.graphs = encoder.graphs, None

    def replayed() -> Any:
        encoder.graphs = own
        try:
            return run()
        finally:
            encoder.graphs = None

    return replayed


def peft_pass(
    encoder: Encoder, config: BertConfig, work: list[Encoding], owners: list[int]
) -> Callable[[], Any] | None:
    """peft's mixed batch, padded as it arrives; ``None`` without peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = LoraConfig(r=RANK, target_modules=["query", "value"], init_lora_weights=False)
        wrapped = get_peft_model(BertModel(config), lora, adapter_name="d0")
        for i in range(1, DELTAS):
            wrapped.add_adapter(f"d{i}", lora)
    wrapped.to(device=encoder.device, dtype=encoder.dtype).eval()
    longest = max(map(len, work))
    ids = torch.tensor([[*e.ids, *[0] * (longest - len(e))] for e in work], device=encoder.device)
    mask = torch.tensor([[1] * len(e) + [0] * (longest - len(e)) for e in work], device=encoder.device)
    names = [f"d{i}" for i in owners]
    return torch.inference_mode()(lambda: wrapped(input_ids=ids, attention_mask=mask, adapter_names=names))


def clock(contenders: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every round, contenders taking turns; three rounds before are not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 3):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def environment(device: str) -> dict[str, str]:
    """Where the figures come from."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "device": gpu,
        "torch": torch.__version__,
        "bertology-serve": bertology_serve.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
