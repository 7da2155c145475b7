"""``bench cpu``: opens contenders in processes of their own, compares their answers, and times them in turns."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bertology_serve.bench.cpu.contenders import (
    ALONE,
    CONTENDERS,
    ENVIRONMENTS,
    LOGITS,
    MIXED,
    ROWS,
    Chosen,
    Contender,
    Suite,
    python_of,
    slug,
)
from bertology_serve.bench.cpu.cpu_log import ANSWERS, EXPORT, HEADER, MISSING, OPENED, SUITE, TIME, Log
from bertology_serve.bench.cpu.subject import BESIDE, BY_ITSELF, GOLD, LONG, MIX, SUITES, Inputs, Subject, prepare
from bertology_serve.bench.cpu.worker_process import WorkerProcess
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import SpecError, Unsupported
from bertology_serve.export.installation import environment

TOGETHER = 12
"""Contenders that are in memory at once, besides the baseline."""
AT_LEAST = 0.05
"""Seconds that a figure takes: shorter workloads are repeated in it."""
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
         "asimd", "asimddp", "i8mm", "bf16", "sve")  # fmt: skip
CPUINFO, RAPL = Path("/proc/cpuinfo"), Path("/sys/class/powercap")
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Plan:
    """How it is measured. ``environments`` are the places of virtual ones by name; ``again`` forgets what is chosen."""

    chosen: Chosen
    rounds: int = 9
    threads: int = 1
    again: bool = False
    environments: Mapping[str, Path] = field(default_factory=dict)


def processor() -> tuple[str, list[str]]:
    """The name of this processor's directory, and those of its flags that matter."""
    text = CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""
    values = dict(re.findall(r"^(model name|cpu family|model|flags|Features)\s*: (.*)$", text, re.MULTILINE))
    has = set((values.get("flags") or values.get("Features") or "").split())
    parts = (environment()["cpu"], values.get("cpu family", ""), values.get("model", ""))
    return slug(" ".join(parts)), [flag for flag in FLAGS if flag in has]


def joules() -> float | None:
    """The energy that all packages have taken, where RAPL can be read."""
    try:
        found = [int(path.read_text(encoding="ascii")) for path in RAPL.glob("intel-rapl:?/energy_uj")]
    except (OSError, ValueError):
        return None
    return sum(found) / 1e6 if found else None


def run(
    encoder: Encoder, delta: Delta, inputs: Inputs, plan: Plan, work: Path, output: Path, say: Callable[[str], None]
) -> Log:
    """Measures what the log in ``output`` lacks, and returns it; files are made in ``work``.

    Raises Unsupported for a task or delta that others could not run, SpecError for a log of something else.
    """
    chosen, (slugged, flags) = plan.chosen, processor()
    names = {one.name for one in SUITES if chosen.takers(one) and set(one.workloads) & set(chosen.workloads)}
    say(f"writing models and batches to {work}")
    subject = prepare(encoder, delta, inputs, work, names)
    log = Log.open(output / slugged / f"{subject.name}.jsonl")
    same = {"key": subject.key, "threads": plan.threads}
    differs = any({name: line[name] for name in same} != same for line in log.of(HEADER))
    if differs and not plan.again:
        raise SpecError(f"{log.path} is of other weights or threads; give another --output, or --again")
    if plan.again:
        log.forget(lambda line: differs or chosen.has(line))
    energy = "joules of the whole package, by RAPL" if joules() else "no joules: RAPL cannot be read here"
    log.add(HEADER, processor=slugged, flags=flags, energy=energy, **(environment() | same))
    for name, (seconds, unchanged) in subject.exports.items():
        log.add(EXPORT, contender=name, seconds=seconds, same=unchanged)
    for suite in subject.suites:
        told = {name: subject.batches[name].facts for name in suite.workloads}
        log.add(SUITE, suite=suite.name, baseline=suite.baseline, workloads=told)
        workloads = [name for name in suite.workloads if name in chosen.workloads]
        _Suite(subject, suite, plan, log, say).run(chosen.takers(suite), workloads)
    return log


class _Suite:
    """One suite under way."""

    def __init__(self, subject: Subject, suite: Suite, plan: Plan, log: Log, say: Callable[[str], None]) -> None:
        self.subject, self.suite, self.plan, self.log, self.say = subject, suite, plan, log, say
        self.known = {one.name: one for one in CONTENDERS if one.family == suite.family}
        self.baseline = self.known[suite.baseline]
        self.expected = dict[tuple[str, str], Rows]()

    def run(self, taking: Sequence[Contender], workloads: Sequence[str]) -> None:
        """Times all that the log lacks."""
        lacking = [one for one in taking if self._lacks(one, workloads)]
        for at in range(0, len(lacking), TOGETHER):
            group = lacking[at : at + TOGETHER]
            with ExitStack() as stack:
                opened = dict[str, WorkerProcess]()
                for one in self._with_baseline(group):
                    try:
                        opened[one.name] = stack.enter_context(self._open(one, one.forms[0]))
                        self._answers(one, opened[one.name])
                    except Unsupported as problem:
                        opened.pop(one.name, None)
                        self._miss(one, str(problem))
                for workload in workloads:
                    self._rounds([one for one in group if one.name in opened], opened, workload)

    def _with_baseline(self, group: Sequence[Contender]) -> list[Contender]:
        return [self.baseline, *(one for one in group if one.name != self.baseline.name)]

    def _lacks(self, one: Contender, workloads: Sequence[str]) -> bool:
        return any(self._timed(one, name) < self.plan.rounds for name in workloads)

    def _timed(self, one: Contender, workload: str) -> int:
        return len(self.log.of(TIME, suite=self.suite.name, workload=workload, contender=one.name))

    def _miss(self, one: Contender, why: str) -> None:
        self.say(f"{one.name}: {why}")
        self.log.forget(
            lambda line: line["what"] == MISSING and (line["suite"], line["contender"]) == (self.suite.name, one.name)
        )
        self.log.add(MISSING, suite=self.suite.name, contender=one.name, why=why)

    def _open(self, one: Contender, form: str) -> WorkerProcess:
        """A worker that has made and loaded the contender; Unsupported where it cannot."""
        places = self.subject.places(self.suite, form)
        size = 0
        for maker, where, options in one.steps:
            places["made"] = str(self._made(maker, where, options, places))
            size = sum(path.stat().st_size for path in Path(places["made"]).rglob("*") if path.is_file())
        options = filled(one.options, places) | {"threads": self.plan.threads}
        if not size and Path(str(options.get("model", ""))).is_file():
            size = Path(str(options["model"])).stat().st_size
        worker = self._worker(one.environment, "our_tools" if one.package else "other_tools")
        try:
            told = worker.ask("open", builder=one.builder, options=options)
        except Unsupported:
            worker.__exit__(None, None, None)
            raise
        if form == one.forms[0]:
            self.log.add(
                OPENED,
                suite=self.suite.name,
                contender=one.name,
                side=one.side,
                precision=one.precision,
                bytes=size,
                **told,
            )
        return worker

    def _worker(self, where: str, builders: str) -> WorkerProcess:
        python = python_of(self.plan.environments, where)
        if python is None:
            needs = " ".join(ENVIRONMENTS[where])
            raise Unsupported(
                f"no environment {where!r} ({needs}); --make-environments DIR makes it, --environments DIR takes it"
            )
        return WorkerProcess(python, builders, self.plan.threads)

    def _made(self, maker: str, where: str, options: Mapping[str, object], places: Mapping[str, str]) -> Path:
        """The directory that a step writes, which is kept as long as what it is made of is the same."""
        told = repr((maker, where, ENVIRONMENTS[where], sorted(filled(options, {**places, "here": ""}).items())))
        digest = hashlib.sha256(told.encode())
        for value in filled({name: options.get(name, "") for name in ("model", "checkpoint")}, places).values():
            for path in (Path(str(value)), Path(str(value)) / "model.safetensors"):
                digest.update(path.read_bytes() if path.is_file() else b"")
        target = self.subject.work / "made" / f"{maker}-{digest.hexdigest()[:12]}"
        if not target.exists():
            part = target.with_name(target.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            with self._worker(where, "other_tools") as worker:
                worker.ask("make", maker=maker, options=filled(options, {**places, "here": str(part)}))
            part.rename(target)
        return target

    def _answers(self, one: Contender, worker: WorkerProcess) -> None:
        """Compares a contender's answers with the reference's, once; Unsupported where they are others."""
        if self.log.of(ANSWERS, suite=self.suite.name, contender=one.name):
            return
        form, workload = one.forms[0], MIX if self.suite.family == ALONE else self.suite.workloads[0]
        found = dict[str, Any]()
        rows = self._rows(worker, one, workload)
        if one.family != MIXED or one.options.get("changed", True) is not False:
            found["relative"] = self._distance(one, form, workload, rows, one.off)
            if LONG in self.suite.workloads:  # nothing is cut off either, though few answers may be small ones
                self._distance(one, form, LONG, self._rows(worker, one, LONG), 4 * one.off)
        if self.suite.family == ALONE:
            beside, alone = (self._rows(worker, one, name) for name in (BESIDE, BY_ITSELF))
            found["neighbours"] = float(np.abs(beside - alone).max())
            if form == LOGITS and GOLD in self.subject.batches:
                found |= self._accuracy(self._rows(worker, one, GOLD))
            if ROWS in one.forms:
                found |= self._cosine(one, rows if form == ROWS else None)
        self.log.add(ANSWERS, suite=self.suite.name, contender=one.name, **found)

    def _distance(self, one: Contender, form: str, workload: str, rows: Rows, most: float) -> float:
        """‖Δ‖/‖reference‖ of answers; Unsupported where it is more than is allowed."""
        expected = self._expected(form, workload)
        _check_shapes(rows, expected)
        relative = float(np.linalg.norm(rows - expected) / np.linalg.norm(expected))
        if not relative <= most:
            raise Unsupported(
                f"its answers to {workload} differ from those of {self.suite.reference} by {relative:.1e} of their "
                f"norm (allowed {most:.0e}): it was not timed"
            )
        return relative

    def _cosine(self, one: Contender, rows: Rows | None) -> dict[str, float]:
        """Of unit embeddings with torch's: on average and at worst."""
        expected = self._expected(ROWS, MIX)
        if rows is None:
            with self._open(one, ROWS) as worker:
                rows = self._rows(worker, one, MIX)
        _check_shapes(rows, expected)
        each = (rows * expected).sum(1) / (np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1))
        return {"cosine": float(each.mean()), "worst": float(each.min())}

    def _accuracy(self, logits: Rows) -> dict[str, Any]:
        """The task's metric, and the share of decisions that are torch's."""
        task, expected = self.subject.inputs.task, self._expected(LOGITS, GOLD)
        assert task is not None
        encodings = [one for batch in self.subject.batches[GOLD].encodings for one in batch]
        answers = [
            task.decode(example, [encoding], [torch.from_numpy(row)])
            for example, encoding, row in zip(self.subject.inputs.examples, encodings, logits, strict=True)
        ]
        same = float((logits.argmax(-1) == expected.argmax(-1)).mean())
        return {"agreement": same, "metrics": dict(task.metrics(answers, self.subject.inputs.examples))}

    def _expected(self, form: str, workload: str) -> Rows:
        """What the reference answers."""
        if (form, workload) not in self.expected:
            one = self.known[self.suite.reference]
            with self._open(one, form if self.suite.family == ALONE else one.forms[0]) as worker:
                self.expected[form, workload] = self._rows(worker, one, workload)
        return self.expected[form, workload]

    def _rows(self, worker: WorkerProcess, one: Contender, workload: str) -> Rows:
        path = self.subject.work / f"answer-{slug(one.name)}.npy"
        worker.ask("answer", workload=self.subject.workload(workload), to=str(path))
        rows: Rows = np.load(path)
        path.unlink()
        return rows

    def _rounds(self, group: Sequence[Contender], opened: dict[str, WorkerProcess], workload: str) -> None:
        """Every turn runs the baseline and each that still lacks a figure, in an order of its own."""
        repeats = dict[str, int]()

        def warm(name: str, worker: WorkerProcess) -> None:
            repeats[name] = self._warm(worker, workload)

        for one in self._with_baseline(group):
            if one.name in opened and self._timed(one, workload) < self.plan.rounds:
                self._guarded(one, opened, partial(warm, one.name))
        turns = [line["turn"] for line in self.log.of(TIME, suite=self.suite.name, workload=workload)]
        for turn in range(max(turns, default=-1) + 1, max(turns, default=-1) + 1 + self.plan.rounds):
            names = [one for one in group if one.name in repeats and self._timed(one, workload) < self.plan.rounds]
            if not names:
                return
            entries = self._with_baseline(names)
            for one in random.Random(turn).sample(entries, len(entries)):
                if one.name in opened:
                    count = repeats.setdefault(one.name, 1)
                    timed = partial(self._time, one=one, workload=workload, turn=turn, repeats=count)
                    self._guarded(one, opened, timed)

    def _guarded(self, one: Contender, opened: dict[str, WorkerProcess], do: Callable[[WorkerProcess], object]) -> None:
        try:
            do(opened[one.name])
        except Unsupported as problem:
            del opened[one.name]
            self._miss(one, str(problem))

    def _warm(self, worker: WorkerProcess, workload: str) -> int:
        """Runs a workload until it is warm; how often it is run for a figure."""
        path = self.subject.workload(workload)
        taken: float = worker.ask("time", workload=path, repeats=1)["cpu"]
        if taken < AT_LEAST:
            taken = worker.ask("time", workload=path, repeats=1)["cpu"]
        return max(1, round(AT_LEAST / max(taken, 1e-4)))

    def _time(self, worker: WorkerProcess, one: Contender, workload: str, turn: int, repeats: int) -> None:
        before = joules()
        told = dict(worker.ask("time", workload=self.subject.workload(workload), repeats=repeats))
        if before is not None:
            told["joules"] = ((joules() or before) - before) / repeats
        self.log.add(TIME, suite=self.suite.name, workload=workload, contender=one.name, turn=turn, **told)


def _check_shapes(rows: Rows, expected: Rows) -> None:
    if rows.shape != expected.shape:
        raise Unsupported(f"its answers have the shape {list(rows.shape)}, expected {list(expected.shape)}")


def filled(options: Mapping[str, object], places: Mapping[str, str]) -> dict[str, object]:
    """Options with their places; a number that was one in a place is one again."""

    def value(one: object) -> object:
        text = one.format_map(places) if isinstance(one, str) else one
        return int(text) if isinstance(text, str) and text.isdigit() else text

    return {name: value(one) for name, one in options.items()}
