"""Which engine runs the batches, torch's or ONNX Runtime's, and how its weights are laid out; chosen by timing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from bertology_serve.encoder.bank import BARE, BankEntry
from bertology_serve.encoder.batch import PackedBatch
from bertology_serve.encoder.linear import pays
from bertology_serve.encoder.loading import rounding
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import SpecError, Unsupported, VerificationError
from bertology_serve.export.export_spec import allowed_drift
from bertology_serve.export.onnx_engine import OnnxEngine
from bertology_serve.serving.config import EnginePrecision
from bertology_serve.tasks.encoding import encode_text

log = logging.getLogger(__name__)
Name = Literal["auto", "torch", "onnx"]
SENTENCE = "a sentence of some twenty words or so, as people send them to a server that reads what they mean"
LENGTHS = (6, 9, 12, 14, 17, 22, 30, 48) * 2
ROUNDS, WARM, DELTAS = 5, 2, 8
BF16_DRIFT = 4 * 2.0**-8
"""The largest ‖Δ‖/‖torch‖ that one layer may add in bf16, whose step is 2⁻⁸, and some four of which it rounds by.
Measured: 0.006."""


def check(engine: Name, precision: EnginePrecision) -> None:
    """Raises SpecError for a precision that the engine does not have."""
    if engine == "torch" and precision == "int8-row":
        raise SpecError(f"--precision {precision} is the ONNX engine's; give --engine onnx or auto with it")
    if engine == "onnx" and precision == "bf16":
        raise SpecError(f"--precision {precision} is torch's engine's; give --engine torch or auto with it")


def settle(pipeline: Pipeline, engine: Name, precision: EnginePrecision = "fp32", known: bool = False) -> str:
    """Gives a pipeline its engine and returns that one's name; in ``bf16`` torch's, rounded before.

    ``auto`` takes ONNX Runtime's where it can run this encoder, agrees with torch's, and is faster on a short timing of
    one short text and a mixed batch, the product of both ratios deciding; the log says which it was and why. ``onnx``
    raises what is in the way (Unsupported, VerificationError). One that is ``known`` to agree here is not compared
    again.
    """
    check(engine, precision)
    pipeline.engine = pipeline.encoder
    if precision == "bf16":
        return _taken("torch, bf16", "known to agree" if known else "asked for")
    if engine == "torch":
        return _taken("torch", "known to be faster" if known else "asked for")
    try:
        onnx = OnnxEngine(pipeline.encoder, precision)
        onnx.prepare_for(pipeline.bank.entries.values(), wait=not known)
        if known:
            pipeline.engine = onnx
            return _taken(onnx.name, "known to agree")
        batch, short = sample(pipeline, onnx.takes), sample(pipeline, onnx.takes, (16,))
        layers = pipeline.encoder.anatomy.layers
        compare(onnx.name, precision, _torch(pipeline, batch), onnx.run(batch, pipeline.bank), layers)
    except (Unsupported, VerificationError) as problem:
        if engine == "onnx":
            raise
        return _taken("torch", str(problem))
    if engine == "auto":
        timed, ratio = [], 1.0
        for one in (short, batch):
            ours, theirs = race(partial(_torch, pipeline, one), partial(onnx.run, one, pipeline.bank))
            timed.append(f"{1e3 * theirs:.1f} ms against torch's {1e3 * ours:.1f} for {one.rows} rows")
            ratio *= theirs / ours
        if ratio >= 1:
            return _taken("torch", f"{onnx.name} takes {', '.join(timed)}")
        pipeline.engine = onnx
        return _taken(onnx.name, ", ".join(timed))
    pipeline.engine = onnx
    return _taken(onnx.name, "asked for")


def _taken(name: str, why: str) -> str:
    log.info("engine: %s (%s)", name, why)
    return name


def sample(pipeline: Pipeline, takes: Callable[[BankEntry], bool], lengths: Sequence[int] = LENGTHS) -> PackedBatch:
    """A batch of texts of these lengths over up to eight of the resident deltas that an engine takes."""
    encoder, words = pipeline.encoder, " ".join([SENTENCE] * 4)
    taken = filter(takes, pipeline.bank.entries.values())
    entries: list[BankEntry] = list(islice(taken, DELTAS)) or [BARE]
    room = encoder.max_tokens - max(entry.prompt_length + entry.prefix_length for entry in entries)
    encodings = [encode_text(encoder.tokenizer, words, None, min(length, room)) for length in lengths]
    owners = [entries[i % len(entries)] for i in range(len(encodings))]
    return encoder.pack(encodings, owners)


def compare(name: str, precision: EnginePrecision, expected: Tensor, found: Tensor, layers: int) -> None:
    """Raises VerificationError where an engine's rows [T, H] are others than torch's in float32."""
    largest, drift = (found - expected).abs().max().item(), ((found - expected).norm() / expected.norm()).item()
    if precision == "fp32":
        close = largest <= rounding(layers, expected.abs().max().item())
    else:
        close = drift <= (layers**0.5 * BF16_DRIFT if precision == "bf16" else allowed_drift(precision, layers))
    if not close:
        raise VerificationError(
            f"{name} gives other rows than torch: max |Δ| {largest:.1e}, drift {drift:.1%}; "
            + ("leave out --precision" if precision == "bf16" else "take --engine torch")
        )


def _torch(pipeline: Pipeline, batch: PackedBatch) -> Tensor:
    with torch.inference_mode():
        return pipeline.encoder.run(batch, pipeline.bank)


def race(one: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
    """The least seconds of each, taking turns: what else the machine does only adds to them."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(WARM + ROUNDS):
        for call, taken in zip((one, other), seconds, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return min(seconds[0][WARM:]), min(seconds[1][WARM:])


@dataclass(frozen=True)
class EngineConfig:
    """What was asked for, or with ``found`` what was settled before on this machine and is not timed again.

    ``prepack`` lays weights out for oneDNN; ``None``: a short timing decides.
    """

    engine: Name = "auto"
    precision: EnginePrecision = "fp32"
    cuda_graphs: bool = False
    prepack: bool | None = None
    found: bool = False


def apply(pipeline: Pipeline, setting: EngineConfig) -> tuple[str, EngineConfig]:
    """Makes a pipeline so; the engine's name, and what was found. Its deltas are what the engines are compared with.

    Raises Unsupported, VerificationError for what cannot be.
    """
    encoder, precision = pipeline.encoder, setting.precision
    check(setting.engine, precision)
    encoder.unpack_weights()
    if precision == "bf16" and not rounded(pipeline, setting.found):
        precision = "fp32"
    prepacked = encoder.prepack(precision == "bf16" or setting.prepack)
    if setting.cuda_graphs and not encoder.use_graphs():
        where = f"{str(encoder.dtype).removeprefix('torch.')} on {encoder.device}"
        raise Unsupported(f"--cuda-graphs: got {where}, expected float16 or bfloat16 on cuda")
    name = settle(pipeline, setting.engine, precision, setting.found)
    engine: Name = "torch" if pipeline.engine is encoder else "onnx"
    if engine == "onnx":
        encoder.unpack_weights()  # ONNX Runtime has laid them out for itself
    prepack = prepacked if encoder.device.type == "cpu" else None
    return name, replace(setting, engine=engine, precision=precision, prepack=prepack, found=True)


def rounded(pipeline: Pipeline, known: bool = False) -> bool:
    """Has the encoder and its deltas compute in bfloat16, for good; False where that is no faster.

    Raises SpecError for an encoder that is not on a CPU in float32 (or rounded already), Unsupported for a delta whose
    values are too large, and VerificationError where rows are too far from those in float32: the pipeline is rounded
    then, and not to be used. What is ``known`` here is neither timed nor compared again.
    """
    encoder = pipeline.encoder
    if encoder.device.type != "cpu" or encoder.dtype not in (torch.float32, torch.bfloat16):
        got = f"{str(encoder.dtype).removeprefix('torch.')} on {encoder.device}"
        raise SpecError(
            f"--precision bf16: got {got}, expected float32 on a CPU; on a GPU give --dtype bfloat16 instead"
        )
    if encoder.dtype == torch.bfloat16:
        return True
    if not known and not pays(torch.bfloat16):
        log.warning("bf16 is no faster than fp32 on this processor: batches run in fp32")
        return False
    if known:
        pipeline.round()
        return True
    batch = sample(pipeline, lambda _: True)
    expected = _torch(pipeline, batch)
    pipeline.round()
    encoder.prepack(True)
    compare("torch in bf16", "bf16", expected, _torch(pipeline, batch).float(), encoder.anatomy.layers)
    return True
