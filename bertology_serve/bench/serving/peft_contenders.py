"""What is timed: the same embeddings of the same texts, by this engine and by peft's ``adapter_names``.

Every contender maps the workload to [CLS] rows [S, H]. Tokenising lies outside the timing, and for peft padding too;
this engine's packing and planning lie inside.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertology_serve.bench.serving.texts_workload import Workload, lengths, owners, texts
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import load_model, locate
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.kinds.kinds import init
from bertology_serve.kinds.lora import Lora
from bertology_serve.serving.config import EnginePrecision
from bertology_serve.serving.execution.engine_choice import EngineConfig, Name, apply
from bertology_serve.tasks.spec import EMBEDDING, TaskSpec

SORTED_BATCH = 16
B_STD = 0.02
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """``run`` answers the whole workload once and returns its rows [S, H], in order of arrival.

    ``engine`` says what runs the batches, where that is this package.
    """

    name: str
    run: Run
    engine: str = ""


def make_deltas(encoder: Encoder, work: Workload) -> list[Delta]:
    """LoRA deltas on query and value whose A and B are random, so that they change something."""
    spec = Lora(rank=work.rank)
    task = TaskSpec(EMBEDDING, head="none", max_length=work.longest, normalize=False)
    found = []
    for number in range(work.deltas):
        generator = torch.Generator().manual_seed(work.seed + number)
        tensors = init([spec], encoder.anatomy, generator)
        for name, tensor in tensors.items():
            if name.endswith(".b"):
                tensor.normal_(0.0, B_STD, generator=generator)
        found.append(Delta(f"d{number}", encoder.ref, task, (spec,), tensors, version="1"))
    return found


def ours(
    encoder: Encoder,
    work: Workload,
    deltas: Sequence[Delta],
    engine: Name = "torch",
    precision: EnginePrecision = "fp32",
    lines: Sequence[str] = (),
) -> list[Contender]:
    """This package with the deltas, and with none: the same task, the same heads, no change of the encoder.

    ``engine`` and ``precision`` as ``apply`` has them, whose errors are raised; ``lines`` are the texts' words.
    """
    pipeline = Pipeline(encoder)
    for delta in deltas:
        pipeline.add(delta)
    bare = Delta("none", encoder.ref, deltas[0].task, version="1")
    pipeline.add(bare)
    runs, _ = apply(pipeline, EngineConfig(engine, precision))
    found = texts(work, encoder.tokenizer, lines)
    names = [deltas[owner].name for owner in owners(work)]

    def contender(label: str, chosen: Sequence[str]) -> Contender:
        jobs = [pipeline.prepare(Request(name, {"text": t})) for name, t in zip(chosen, found, strict=True)]
        return Contender(label, lambda: torch.tensor([p.answer["embedding"] for p in pipeline.run(jobs)]), runs)

    return [contender("ours", names), contender("ours, no delta", ["none"] * work.sequences)]


def peft(encoder: Encoder, work: Workload, deltas: Sequence[Delta], lines: Sequence[str] = ()) -> list[Contender]:
    """peft with the batch as it arrives, and in batches of 16 sorted by length; ImportError where peft is missing."""
    model = _peft_model(encoder, deltas)
    tokenizer, found = encoder.tokenizer, texts(work, encoder.tokenizer, lines)
    names = [deltas[owner].name for owner in owners(work)]

    def contender(label: str, batches: Sequence[Sequence[int]]) -> Contender:
        inputs = [tokenizer([found[i] for i in batch], padding=True, return_tensors="pt") for batch in batches]
        chosen = [[names[i] for i in batch] for batch in batches]
        back = torch.tensor([i for batch in batches for i in batch]).argsort()

        @torch.inference_mode()
        def run() -> Tensor:
            rows = [
                model(**one, adapter_names=own).last_hidden_state[:, 0] for one, own in zip(inputs, chosen, strict=True)
            ]
            return torch.cat(rows)[back]

        return Contender(label, run)

    everything = list(range(work.sequences))
    ranked = sorted(everything, key=lengths(work).__getitem__)
    sixteens = [ranked[at : at + SORTED_BATCH] for at in range(0, work.sequences, SORTED_BATCH)]
    return [contender("peft, as it arrives", [everything]), contender("peft, sorted in 16s", sixteens)]


def _peft_model(encoder: Encoder, deltas: Sequence[Delta]) -> Any:
    """A fresh model with all deltas, each written by this package and read by peft."""
    from peft import PeftModel

    model, _ = load_model(locate(encoder.name))
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that is on its way out
        paths = [Path(directory) / delta.name / delta.version for delta in deltas]
        for path, delta in zip(paths, deltas, strict=True):
            delta.save(path, encoder)
        wrapped = PeftModel.from_pretrained(model, paths[0], adapter_name=deltas[0].name)
        for path, delta in zip(paths[1:], deltas[1:], strict=True):
            wrapped.load_adapter(path, adapter_name=delta.name)
    return wrapped.eval()
