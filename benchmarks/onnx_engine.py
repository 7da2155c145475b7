"""The ONNX engine beside one merged model, beside the torch engine, and beside peft.

    python benchmarks/onnx_engine.py --texts sst2/train.jsonl.gz --output benchmarks/results/onnx_engine.json

MiniLM, one thread. Processor time of the process, so that other work on the machine counts little; contenders take
turns, and a ratio is the median over rounds of the ratio within each round. ``--texts`` are JSON lines with
``text_a``; without, those of SST-2, MRPC and RTE in the folder ``BERTOLOGY_DATA``, or sentences of this project. Texts
are cut or joined to the lengths of the workload.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
import torch

from bertology_serve.bench.serving import peft_contenders
from bertology_serve.bench.serving.texts_workload import Workload, lengths
from bertology_serve.data.set_files import locate
from bertology_serve.data.sets import SETS
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.bank import BARE, DeltaBank
from bertology_serve.encoder.batch import PackedBatch, pack
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.export.emitter.delta_inputs import texts as padded
from bertology_serve.export.emitter.emit import emit
from bertology_serve.export.export_directory import save
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import PORTABLE
from bertology_serve.export.installation import environment
from bertology_serve.export.onnx_engine import OnnxEngine, buckets
from bertology_serve.export.samples import SENTENCES
from bertology_serve.export.session import Session
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.kinds import init
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.tasks.encoding import encode_text
from bertology_serve.tasks.spec import Encoding, TaskSpec

REAL = ("glue/sst2", "glue/mrpc", "glue/rte")
"""Sets whose texts are taken where the folder BERTOLOGY_DATA holds them."""
Calls = dict[str, Callable[[], Any]]
WARM = 2
TASK = TaskSpec("embedding", head="none", max_length=128, normalize=False)
LORA, ATTENTION, ALL = Lora(rank=8), Bitfit("attention"), Bitfit()
# batch -> the components of its deltas, dealt to the sequences in turn; bars are for ours ÷ merged, float32
BATCHES: dict[str, tuple[int, list[Any], float | None]] = {
    "8 LoRA": (64, [LORA] * 8, 1.12),
    "4 LoRA, 4 BitFit of query, key, value": (64, [LORA, ATTENTION] * 4, 1.12),
    "4 LoRA, 4 BitFit of all biases": (64, [LORA, ALL] * 4, 1.12),
    "32 LoRA, one row each": (32, [LORA] * 32, 1.15),
    "no delta": (64, [None], None),
    "8 Houlsby adapters of 48": (64, [Adapter(width=48)] * 8, None),
    "8 Pfeiffer adapters of 48": (64, [Adapter("pfeiffer", 48)] * 8, None),
    "8 prompts of 8": (64, [Prompt(8)] * 8, None),
    "8 prefixes of 8": (64, [Prefix(8)] * 8, None),
}
BARS = (
    ("torch engine", "ONNX fp32", 1.0),
    ("torch engine", "ONNX int8-row", 1.6),
    ("peft, sorted in 16s", "ONNX int8-row", 5.0),
    ("peft, as it arrives", "ONNX int8-row", 15.0),
)


def delta(encoder: Encoder, name: str, specs: Sequence[Any], seed: int) -> Delta:
    """A delta of random tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = init(specs, encoder.anatomy, generator)
    for tensor in tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.02)
    return Delta(name, encoder.ref, TASK, tuple(specs), tensors, version="1")


def encodings(encoder: Encoder, sizes: Sequence[int], lines: Iterator[str]) -> list[Encoding]:
    """Real texts, joined until they are long enough and cut to exactly these lengths."""
    found = []
    for size in sizes:
        text = next(lines)
        while len(encode_text(encoder.tokenizer, text, None, size)) < size:
            text += " " + next(lines)
        found.append(encode_text(encoder.tokenizer, text, None, size))
    return found


def merged(encoder: Encoder, precision: Any, directory: Path) -> Session:
    """One LoRA delta folded into the weights: the export that serves it alone."""
    path = directory / f"{precision}.onnx"
    save(
        emit(
            ExportInputs.of(encoder, delta(encoder, "merged", [LORA], 0), True, precision),
            PORTABLE,
            True,
            precision,
        ),
        path,
    )
    return Session(path)


def times(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every round but the warm ones."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + WARM):
        for name, call in calls.items():
            started = time.process_time()
            call()
            taken[name].append(time.process_time() - started)
    return {name: seconds[WARM:] for name, seconds in taken.items()}


def ratio(taken: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times as long the one takes."""
    return median(a / b for a, b in zip(taken[slow], taken[fast], strict=True))


def graphs(encoder: Encoder, lines: Iterator[str], rounds: int, directory: Path) -> list[dict[str, Any]]:
    """Mixed batches against one merged model on the same texts, in the same buckets of length."""
    engines = {precision: OnnxEngine(encoder, precision) for precision in ("fp32", "int8-row")}
    alone = {precision: merged(encoder, precision, directory) for precision in engines}
    rows = []
    for name, (sequences, kinds, bar) in BATCHES.items():
        bank = DeltaBank(encoder.anatomy, encoder.dtype, encoder.device)
        made = [
            BARE if spec is None else bank.add(str(i), delta(encoder, str(i), [spec], i).effects(encoder.anatomy))
            for i, spec in enumerate(kinds)
        ]
        texts = encodings(encoder, lengths(Workload(sequences, 1, longest=64)), lines)
        owners = [made[i % len(made)] for i in range(sequences)]
        batch = pack(texts, owners, encoder.anatomy, encoder.device)
        plain = pack(texts, [BARE] * sequences, encoder.anatomy, encoder.device)
        calls: Calls = {}
        for precision, engine in engines.items():
            calls[f"merged {precision}"] = lambda p=precision, b=plain: one_model(engines[p], alone[p], b)
            calls[f"ours {precision}"] = lambda e=engine, b=batch, k=bank: e.run(b, k)
        calls["torch"] = lambda b=batch, k=bank: reference(encoder, b, k)
        taken = times(calls, rounds)
        rows.append(
            {
                "batch": name,
                "rows": batch.rows,
                "bar": bar,
                "merged_ms": 1e3 * median(taken["merged fp32"]),
                "fp32": ratio(taken, "ours fp32", "merged fp32"),
                "int8-row": ratio(taken, "ours int8-row", "merged int8-row"),
                "torch": ratio(taken, "torch", "ours fp32"),
                "largest": float((engines["fp32"].run(batch, bank) - reference(encoder, batch, bank)).abs().max()),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def one_model(engine: OnnxEngine, session: Session, batch: PackedBatch) -> None:
    """The merged model over a batch, in the buckets that the engine would make."""
    for group in buckets(batch.lengths, engine.export_inputs.anatomy.hidden):
        session.run(padded(batch, group, engine.export_inputs.inputs))


@torch.inference_mode()
def reference(encoder: Encoder, batch: PackedBatch, bank: DeltaBank) -> torch.Tensor:
    """The torch engine's rows."""
    return encoder.run(batch, bank)


def server(encoder: Encoder, lines: Sequence[str], rounds: int) -> dict[str, Any]:
    """The pipeline's answers to 64 texts, mean 24 tokens, longest 128, over 8 LoRA deltas; and peft's."""
    work = Workload()
    deltas = peft_contenders.make_deltas(encoder, work)
    calls: Calls = {"torch engine": peft_contenders.ours(encoder, work, deltas, lines=lines)[0].run}
    for precision in ("fp32", "int8-row"):
        calls[f"ONNX {precision}"] = peft_contenders.ours(encoder, work, deltas, "onnx", precision, lines)[0].run
    calls |= {one.name: one.run for one in peft_contenders.peft(encoder, work, deltas, lines)}
    expected = calls["torch engine"]()
    largest = {name: float((call() - expected).abs().max()) for name, call in calls.items()}
    taken = times(calls, rounds)
    bars = [{"slow": slow, "fast": fast, "bar": bar, "measured": ratio(taken, slow, fast)} for slow, fast, bar in BARS]
    found = {"ms": {name: 1e3 * median(one) for name, one in taken.items()}, "largest": largest, "bars": bars}
    print(json.dumps(found), flush=True)
    return found


def lines_of(path: str | None) -> list[str]:
    """Texts: of a file, of three sets in turn, or of this project."""
    found = {name: locate(SETS[name], "train") for name in REAL}
    paths = [Path(path)] if path else [one for one in found.values() if one is not None]
    return [line for lines in zip(*map(_lines, paths), strict=False) for line in lines] or list(SENTENCES)


def _lines(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return [json.loads(line)["text_a"] for line in itertools.islice(file, 5000)]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| batch | rows | ours ÷ merged, fp32 | bar | int8-row | torch ÷ ours | max abs diff |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result["graphs"]:
        bar = "" if one["bar"] is None else f"≤ {one['bar']}"
        lines.append(
            f"| {one['batch']} | {one['rows']} | {one['fp32']:.2f} | {bar} | {one['int8-row']:.2f} "
            f"| {one['torch']:.2f} | {one['largest']:.0e} |"
        )
    lines += ["", "| 64 texts, 8 LoRA deltas | measured | bar |", "|---|---|---|"]
    lines += [
        f"| {one['slow']} ÷ {one['fast']} | {one['measured']:.2f} | ≥ {one['bar']:g} |"
        for one in result["server"]["bars"]
    ]
    return "\n".join(lines)


def main() -> None:
    """Prints two Markdown tables; writes everything as JSON."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--texts", default=None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    encoder = Encoder.load(options.backbone)
    where = environment() | {"prepacked": encoder.prepack()}
    where["versions"]["onnxruntime"] = onnxruntime.__version__
    with tempfile.TemporaryDirectory() as directory:
        lines = lines_of(options.texts)
        rows = graphs(encoder, itertools.cycle(lines), options.rounds, Path(directory))
    result = {
        "benchmark": "onnx_engine",
        "environment": where,
        "graphs": rows,
        "server": server(encoder, lines, options.rounds),
    }
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
