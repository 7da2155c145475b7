"""What is measured: the files that contenders open, and the batches that they are given, written once for all."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertology_serve import examples
from bertology_serve.bench.cpu.contenders import (
    ALONE,
    BITFIT8,
    EAGER,
    ENGINE,
    FORMS,
    KINDS8,
    LOGITS,
    LORA8,
    LORA32,
    MIXED,
    ROWS,
    UNPADDED,
    Suite,
    slug,
)
from bertology_serve.bench.serving.texts_workload import Workload, fitted, lengths, owners
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import locate
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import Unsupported
from bertology_serve.export import hf_model
from bertology_serve.export.emitter.emit import emit
from bertology_serve.export.export_directory import save
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import PORTABLE, Precision
from bertology_serve.export.samples import Case
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.kinds import Spec
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.tasks.base import Task
from bertology_serve.tasks.encoding import encode_text
from bertology_serve.tasks.spec import CLASSIFICATION, EMBEDDING, REGRESSION, Encoding, TaskSpec

SIXTEEN, TOGETHER = 16, 32
MIX, SORTED, LONG = "64 mixed", "64 sorted in 16s", "8x512"
SHAPES = ((8, 128), (1, 16), (1, 256), (8, 512))
OWN, GOLD, BESIDE, BY_ITSELF = "texts as they come", "gold", "neighbours", "alone"
CALIBRATION = "calibration"
LONGEST, MEAN = 128, 24.0
"""Of mixed texts, in tokens."""


@dataclass(frozen=True)
class Batches:
    """Rows of texts by batch, with the delta that each row is for."""

    name: str
    texts: Sequence[Sequence[str]]
    encodings: Sequence[Sequence[Encoding]]
    owners: Sequence[Sequence[str]]

    @property
    def facts(self) -> dict[str, float]:
        """``sequences``, ``tokens``, and ``fill``: the share of a padded grid that is tokens."""
        sizes = [[len(one) for one in batch] for batch in self.encodings]
        grid = sum(len(batch) * max(batch) for batch in sizes)
        tokens = sum(map(sum, sizes))
        return {"sequences": sum(map(len, sizes)), "tokens": tokens, "fill": round(tokens / grid, 3)}

    def write(self, directory: Path, pad: int) -> None:
        """As ``worker.py`` reads them."""
        arrays: dict[str, Any] = {}  # savez has an option among the names
        for number, batch in enumerate(self.encodings):
            case = Case(tuple(batch), max(map(len, batch)), left=False)
            arrays |= {f"{number}.{name}": array for name, array in case.arrays(pad).items()}
        np.savez(directory / f"{self.name}.npz", **arrays)
        told = {"texts": self.texts, "owners": self.owners}
        (directory / f"{self.name}.json").write_text(json.dumps(told), encoding="utf-8")


@dataclass(frozen=True)
class Inputs:
    """What is measured besides: texts of one's own, labelled examples for the metric (none: no metric)."""

    texts: Sequence[Encoding] = ()
    task: Task | None = None
    examples: Sequence[Any] = ()


@dataclass
class Subject:
    """An encoder and a delta, written to ``work``; ``exports`` are seconds and whether the bytes were the same."""

    name: str
    key: str
    work: Path
    base: str
    family: str
    width: int
    suites: Sequence[Suite]
    batches: Mapping[str, Batches]
    inputs: Inputs
    exports: Mapping[str, tuple[float, bool]] = field(default_factory=dict)

    def workload(self, name: str) -> str:
        """The path of a workload, for ``worker.py``."""
        return str(self.work / "workloads" / name)

    def places(self, suite: Suite, form: str) -> dict[str, str]:
        """What options are filled in with."""
        deltas = self.work / "deltas" / (f"{suite.name}-{form}" if suite.family == ALONE else suite.name)
        return {
            "work": str(self.work), "base": self.base, "checkpoint": str(self.work / f"checkpoint-{form}"),
            "form": form, "pool": "mean" if form == ROWS else "", "deltas": str(deltas), "family": self.family,
            "task": "feature-extraction" if form == ROWS else "text-classification", "width": str(self.width),
        }  # fmt: skip


SUITES = (
    Suite(ALONE, ALONE, ("8x128", MIX, SORTED, "1x16", "1x256", LONG, OWN), UNPADDED, EAGER),
    *(Suite(name, MIXED, (name,), ENGINE, ENGINE) for name in (LORA8, KINDS8, BITFIT8, LORA32)),
)
DELTAS: Mapping[str, tuple[int, int, Sequence[Spec]]] = {
    LORA8: (64, 8, (Lora(rank=8),)),
    KINDS8: (64, 8, (Lora(rank=8), Bitfit(), Ia3(), Adapter("pfeiffer", 16), Prefix(8))),
    BITFIT8: (64, 8, (Bitfit(),)),
    LORA32: (32, 32, (Lora(rank=8),)),
}
"""Sequences, deltas, and what these are in turn."""
WORKLOADS = tuple(name for suite in SUITES for name in suite.workloads)


def bare(encoder: Encoder) -> Delta:
    """A delta that changes nothing, with a random head of two classes."""
    task = TaskSpec(CLASSIFICATION, ("a", "b"))
    head = encoder.head(task, torch.Generator().manual_seed(0))
    return Delta("bare", encoder.ref, task, head=head.own_tensors(), version="1")


def task_model(export_inputs: ExportInputs, delta: Delta) -> Any:
    """HuggingFace's own model for the task, float32, on CPU, not training, its attention the quickest that it has.

    ``export_inputs`` are those of the merged delta. Raises Unsupported where something of it does not fold, or where
    HuggingFace has no model for the task.
    """
    names = hf_model.task_models(delta)
    if not names or delta.effects(export_inputs.anatomy).unfoldable:
        raise Unsupported(
            f"delta {delta.name!r} is no checkpoint that others could export; give one that folds, with the head of "
            "transformers (train --method lora --head hf --pooling cls)"
        )
    return hf_model.task_model(export_inputs, names[0], _attention(export_inputs))


def _attention(export_inputs: ExportInputs) -> str:
    return "sdpa" if getattr(export_inputs.kind, "_supports_sdpa", False) else "eager"


def prepare(encoder: Encoder, delta: Delta, inputs: Inputs, work: Path, suites: Collection[str]) -> Subject:
    """Writes all files of some suites; those of an earlier call are replaced.

    Raises Unsupported for a task that is not one row of logits a sequence.
    """
    if delta.task.kind not in (CLASSIFICATION, REGRESSION):
        raise Unsupported(f"delta {delta.name!r} answers {delta.task.kind}; expected classification or regression")
    made = _Files(encoder, work)
    batches, exports = [made.mix(CALIBRATION, 64, (delta.name,), seed=7)], dict[str, tuple[float, bool]]()
    if ALONE in suites:
        batches += [*made.alone(delta.name), *made.neighbours(delta.name)]
        for name, encodings in ((OWN, inputs.texts), (GOLD, made.gold(inputs))):
            batches += [made.as_they_come(name, encodings, delta.name)] if encodings else []
        exports = made.models(delta)
    batches += [made.mixed(name) for name in DELTAS if name in suites]
    made.write(batches)
    known = {one.name: one for one in batches}
    told = [replace(one, workloads=tuple(name for name in one.workloads if name in known)) for one in SUITES]
    return Subject(
        f"{slug(Path(encoder.name).name)}-{slug(delta.name)}", key(delta), work, str(locate(encoder.name)),
        encoder.anatomy.family, encoder.anatomy.hidden, [one for one in told if one.workloads], known, inputs, exports,
    )  # fmt: skip


def key(delta: Delta) -> str:
    """Of the weights that are measured: those of the base and of the delta."""
    digest = hashlib.sha256(delta.base.sha256.encode())
    for tensors in (delta.tensors, delta.head, delta.weights):
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Files:
    """Writes batches and models of an encoder into a directory."""

    def __init__(self, encoder: Encoder, work: Path) -> None:
        self.encoder, self.work, self.longest = encoder, work, encoder.max_tokens
        shutil.rmtree(work / "deltas", ignore_errors=True)  # a folder is all that an engine holds
        for name in ("workloads", "ours", "deltas", "merged", "merged-int8-row"):
            (work / name).mkdir(parents=True, exist_ok=True)
        lines = examples.path("sentiment", "train").read_text(encoding="utf-8").splitlines()
        self.lines = [json.loads(line)["text"] for line in lines]

    def write(self, batches: Sequence[Batches]) -> None:
        """All workloads."""
        for one in batches:
            one.write(self.work / "workloads", self.encoder.tokenizer.pad_token_id or 0)

    def batches(self, name: str, texts: Sequence[Sequence[str]], owners: Sequence[Sequence[str]]) -> Batches:
        """Texts as they are."""
        encodings = [[encode_text(self.encoder.tokenizer, one, None, self.longest) for one in batch] for batch in texts]
        return Batches(name, texts, encodings, owners)

    def mix(self, name: str, count: int, named: Sequence[str], seed: int = 0) -> Batches:
        """One batch of mixed lengths, its rows of the deltas ``named`` in a random order."""
        longest = min(LONGEST, self.longest)
        work = Workload(count, len(named), min(MEAN, longest / 2), longest, seed=seed)
        start = 31 * seed % len(self.lines)
        texts = fitted(lengths(work), self.encoder.tokenizer, [*self.lines[start:], *self.lines[:start]])
        return self.batches(name, [texts], [[named[owner] for owner in owners(work)]])

    def alone(self, owner: str) -> Iterator[Batches]:
        """The workloads of one model."""
        for rows, columns in SHAPES:
            texts = fitted([min(columns, self.longest)] * rows, self.encoder.tokenizer, self.lines)
            yield self.batches(f"{rows}x{columns}", [texts], [[owner] * rows])
        mix = self.mix(MIX, 64, (owner,))
        yield mix
        ranked = sorted(range(64), key=lambda row: len(mix.encodings[0][row]))
        parts = [ranked[at : at + SIXTEEN] for at in range(0, 64, SIXTEEN)]
        yield self.batches(SORTED, [[mix.texts[0][row] for row in part] for part in parts], [[owner] * SIXTEEN] * 4)

    def neighbours(self, owner: str) -> Iterator[Batches]:
        """The same texts in one batch, and each by itself."""
        beside = self.mix(BESIDE, SIXTEEN, (owner,), seed=3)
        yield beside
        yield self.batches(BY_ITSELF, [[text] for text in beside.texts[0]], [[owner]] * SIXTEEN)

    def as_they_come(self, name: str, encodings: Sequence[Encoding], owner: str) -> Batches:
        """Sequences in their own order, 32 a batch."""
        parts = [encodings[at : at + TOGETHER] for at in range(0, len(encodings), TOGETHER)]
        texts = [
            [str(self.encoder.tokenizer.decode(list(one.ids), skip_special_tokens=True)) for one in part]
            for part in parts
        ]
        return Batches(name, texts, parts, [[owner] * len(part) for part in parts])

    def gold(self, inputs: Inputs) -> list[Encoding]:
        """The sequences of labelled examples; each has one."""
        if inputs.task is None:
            return []
        return [one for example in inputs.examples for one in inputs.task.encode(example, self.encoder.tokenizer)]

    def models(self, delta: Delta) -> dict[str, tuple[float, bool]]:
        """Checkpoints, deltas and graphs with the task's head, and of mean-pooled embeddings; see ``exports``."""
        task = TaskSpec(EMBEDDING, head="none", pooling="mean", max_length=delta.task.max_length)
        exports = {}
        for form, one in ((LOGITS, delta), (ROWS, replace(delta, task=task, head={}))):
            own, place = ExportInputs.of(self.encoder, one, True), self.work / f"checkpoint-{form}"
            model = (
                task_model(own, one)
                if form == LOGITS
                else hf_model.hf_model(own.kind, own.config, own.state, _attention(own))
            )
            model.save_pretrained(place)
            self.encoder.tokenizer.save_pretrained(place)
            one.save(self.work / "deltas" / f"{ALONE}-{form}" / delta.name, self.encoder, overwrite=True)
            for name, (unpad, precision) in FORMS.items():
                path = self.work / "ours" / f"{slug(name)}-{form}.onnx"
                started = time.perf_counter()
                self._export(one, path, unpad, precision)
                seconds, first = time.perf_counter() - started, path.read_bytes()
                if form == LOGITS:
                    self._export(one, path, unpad, precision)
                    exports[name] = seconds, path.read_bytes() == first
        return exports

    def mixed(self, suite: str) -> Batches:
        """Random deltas over the base, and one batch for them; the first suite's merged too."""
        rows, count, kinds = DELTAS[suite]
        task = TaskSpec(EMBEDDING, head="none", max_length=min(LONGEST, self.longest), normalize=False)
        names = [f"d{number}" for number in range(count)]
        for number, name in enumerate(names):
            delta = random_delta(self.encoder, name, kinds[number % len(kinds)], task, number)
            delta.save(self.work / "deltas" / suite / name, self.encoder, overwrite=True)
            if suite == LORA8:
                for folder, precision in (("merged", "fp32"), ("merged-int8-row", "int8-row")):
                    path = self.work / folder / f"{name}.onnx"
                    self._export(delta, path, True, precision)  # type: ignore[arg-type]
        return self.mix(suite, rows, names)

    def _export(self, delta: Delta, path: Path, unpad: bool, precision: Precision) -> None:
        save(emit(ExportInputs.of(self.encoder, delta, True, precision), PORTABLE, unpad, precision), path)


def random_delta(encoder: Encoder, name: str, spec: Spec, task: TaskSpec, seed: int) -> Delta:
    """A delta all of whose tensors are random, so that it changes something."""
    live = TrainableDelta(encoder, [spec], task, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return live.freeze(name, version="1")
