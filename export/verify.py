"""Runs an exported file in ONNX Runtime beside the torch engine; what does not agree is not published."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import rounding
from bertology_serve.errors import VerificationError
from bertology_serve.export.export_spec import ExportSpec, Neighbours
from bertology_serve.export.samples import Case, Reference, Theirs
from bertology_serve.export.session import Session
from bertology_serve.tasks.spec import CLASSIFICATION, QUESTION_ANSWERING, TOKEN_CLASSIFICATION, TaskSpec

Output = NDArray[np.float32]
NEIGHBOURS, SHORT = 4, 64


@dataclass(frozen=True)
class Bars:
    """By how much a file may differ from torch, in an encoder of so many ``layers``.

    In float32 every output by ``atol``, by default what float32 rounds in those layers (``rounding``). With a
    ``max_drift`` above 0, ‖Δ‖/‖torch‖ over all outputs counts instead. Neighbours in a batch may change ``nothing`` of
    a row but what float32 rounds, what the file's own ``rounding`` does (``max_drift`` of the largest output), or
    ``anything``.
    """

    layers: int
    atol: float | None = None
    max_drift: float = 0.0
    neighbours: Neighbours = "nothing"

    @classmethod
    def of(cls, spec: ExportSpec, layers: int) -> Bars:
        """Those of an export."""
        return cls(layers, spec.atol, spec.drift(layers), spec.neighbours)

    def output(self, scale: float) -> float:
        """What outputs that reach ``scale`` may differ by."""
        return rounding(self.layers, scale) if self.atol is None else self.atol

    def neighbour(self, scale: float) -> float | None:
        """What neighbours may change in a row whose outputs reach ``scale``; ``None``: anything."""
        return {"nothing": self.output(scale), "rounding": self.max_drift * scale, "anything": None}[self.neighbours]


@dataclass(frozen=True)
class Compared:
    """One batch: its shape, |Δ| over all outputs of real rows, and the largest output."""

    shape: str
    largest: float
    mean: float
    scale: float


@dataclass(frozen=True)
class Witness:
    """The torch engine beside somebody else's code, called ``name``: the ``largest`` |Δ|, and how much is allowed."""

    name: str
    sequences: int
    largest: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """NaN does not."""
        return self.largest <= self.allowed

    def line(self) -> str:
        """``torch against NAME ...``."""
        return (
            f"torch against {self.name}, {self.sequences} sequences: max |Δ| {self.largest:.1e} "
            f"(allowed {self.allowed:.1e})"
        )


@dataclass(frozen=True)
class Report:
    """What the verifier found. Differences are absolute, on logits or embedding components.

    ``atol`` is what outputs of this size may differ by; ``drift`` is ‖Δ‖/‖expected‖ over all outputs; ``max_drift`` is
    above 0 for quantised files, and then what counts.

    ``agreement`` is the share of decisions (the best class, tag, or start and end) that are the same, ``None`` for
    tasks that decide nothing; ``neighbours`` the largest change of a row when it is run alone, of which at most
    ``neighbours_allowed`` is accepted (``None``: anything), and ``flips`` the share of decisions that this changes;
    ``scale`` the largest |output|, which float32's own noise grows with. ``asked`` is the provider that was wanted,
    ``provider`` the one that ran. ``lost`` is the share of the delta that a cast of the merged weights loses, by type.
    ``witnesses`` are references that are not this package's, as many as there are deltas that others can run.
    """

    runtime: str
    provider: str
    atol: float
    largest: float
    mean: float
    agreement: float | None
    neighbours: float
    scale: float
    sequences: int
    shapes: tuple[Compared, ...]
    drift: float = 0.0
    max_drift: float = 0.0
    neighbours_allowed: float | None = 0.0
    flips: float | None = None
    asked: str = ""
    lost: Mapping[str, float] | None = None
    witnesses: tuple[Witness, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing is ``wrong``."""
        return not self.wrong

    @property
    def wrong(self) -> str:
        """What to do about the first thing that is not within its bar; empty where all is. NaN is within none.

        Every difference must be within ``atol``, or the drift within ``max_drift``; what neighbours change in a row
        must be allowed, and the witnesses agree, either way.
        """
        for one in self.witnesses:
            if not one.agrees:
                return (
                    f"{one.line()}: the delta is not answered as {one.name} does, and no option mends that; report it"
                )
        if self.max_drift and not self.drift <= self.max_drift:
            return "give a larger --max-drift if that will do, or leave out --precision"
        if not self.max_drift and not self.largest <= self.atol:
            return "give a larger --atol if that will do, or leave out --merge to see whether folding is the cause"
        if self.neighbours_allowed is not None and not self.neighbours <= self.neighbours_allowed:
            return f"neighbours may change a row by {self.neighbours_allowed:.1e}; leave out --precision" + (
                "" if self.max_drift else ", or give a larger --atol"
            )
        return ""

    def line(self) -> str:
        """The result in one line."""
        shapes = len({one.shape for one in self.shapes})
        decided = "" if self.agreement is None else f", {self.agreement:.2%} of decisions the same"
        drifted = f"drift {self.drift:.2%} (allowed {self.max_drift:.0%}), " if self.max_drift else ""
        allowed = "" if self.max_drift else f" (allowed {self.atol:.1e}, outputs reach {self.scale:.3g})"
        beside = "".join(f"; {one.line()}" for one in self.witnesses)
        loses = ", ".join(f"{name} {share:.1%}" for name, share in (self.lost or {}).items())
        lost = f", a cast loses of the delta: {loses}" if loses else ""
        return (
            f"{'agrees' if self.passed else 'DIFFERS'}: {self.runtime} ({self.provider}) against torch, "
            f"{self.sequences} sequences in {shapes} shapes: {drifted}max |Δ| {self.largest:.1e}{allowed}, "
            f"mean {self.mean:.1e}{decided}, neighbours change a row by {self.neighbours:.1e}{lost}{beside}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"passed": self.passed, **asdict(self)}


class Tally:
    """What batches say, added up: each sequence's expected and found output, and its task."""

    def __init__(self) -> None:
        self.compared: list[Compared] = []
        self._same: list[bool] = []
        self._squares = np.zeros(2)
        self._sequences = 0

    def add(self, shape: str, expected: Sequence[Output], found: Sequence[Output], tasks: Sequence[TaskSpec]) -> None:
        """One batch of that shape."""
        pairs = list(zip(expected, found, tasks, strict=True))
        differences = np.concatenate([np.abs(e - f).ravel() for e, f, _ in pairs])
        self._squares += [_square(differences), sum(map(_square, expected))]
        scale = max(float(np.abs(one).max()) for one in expected)
        self.compared.append(Compared(shape, float(differences.max()), float(differences.mean()), scale))
        self._same += [a == b for e, f, task in pairs for a, b in _decisions(e, f, task)]
        self._sequences += len(pairs)

    @property
    def scale(self) -> float:
        """The largest |output|."""
        return float(np.max([one.scale for one in self.compared]))

    def report(self, session: Session, bars: Bars, neighbours: float, flips: float | None = None) -> Report:
        """All of it."""
        off, whole = np.sqrt(self._squares).tolist()
        return Report(
            runtime=f"onnxruntime {session.version}",
            provider=session.provider,
            atol=bars.output(self.scale),
            largest=float(np.max([one.largest for one in self.compared])),
            mean=float(np.mean([one.mean for one in self.compared])),
            agreement=sum(self._same) / len(self._same) if self._same else None,
            neighbours=neighbours,
            scale=self.scale,
            sequences=self._sequences,
            shapes=tuple(self.compared),
            drift=off / whole if whole else math.inf if off else 0.0,
            max_drift=bars.max_drift,
            neighbours_allowed=bars.neighbour(self.scale),
            flips=flips,
            asked=session.asked,
        )


def verify(session: Session, reference: Reference, cases: Iterable[Case], pad: int, bars: Bars) -> Report:
    """Compares a file with the torch engine on every case."""
    task, tally, cases = reference.task, Tally(), list(cases)
    for case in cases:
        expected = [out.numpy() for out in reference.outputs(case.encodings)]
        tally.add(case.shape, expected, _rows(session, case, pad, task), [task] * len(expected))
    changed, flips = _neighbours(session, cases, pad, task)
    return tally.report(session, bars, changed, flips)


def witnesses(encoder: Encoder, delta: Delta, reference: Reference, cases: Sequence[Case]) -> tuple[Witness, ...]:
    """The torch engine beside HuggingFace's own model, on the largest batches of short sequences.

    Empty where there is no such model of the delta.
    """
    theirs = Theirs.of(encoder, delta)
    if theirs is None:
        return ()
    short = sorted((case for case in cases if case.length <= SHORT), key=lambda case: sum(map(len, case.encodings)))
    differences, scale, sequences = [0.0], [0.0], 0
    for case in short[-NEIGHBOURS:]:
        pairs = zip(reference.outputs(case.encodings), theirs.outputs(case.encodings), strict=True)
        for own, other in pairs:
            differences.append(float((own - other).abs().max()))
            scale.append(float(other.abs().max()))
        sequences += len(case.encodings)
    allowed = rounding(encoder.anatomy.layers, float(np.max(scale)))
    return (Witness(theirs.name, sequences, float(np.max(differences)), allowed),)


def _square(values: Output) -> float:
    """The squared norm."""
    return float(np.square(values, dtype=np.float64).sum())


def check(report: Report) -> None:
    """Raises VerificationError unless the report passed."""
    if not report.passed:
        worst = max(report.shapes, key=lambda one: (np.isnan(one.largest), one.largest))
        raise VerificationError(f"{report.line()}; worst at {worst.shape}; nothing was published: {report.wrong}")


def _rows(session: Session, case: Case, pad: int, task: TaskSpec) -> list[Output]:
    """A case's outputs in ONNX Runtime, a sequence each, padding left out."""
    out = session.run(case.arrays(pad))
    return [out[row, case.columns(row)] if task.per_token else out[row] for row in range(len(case.encodings))]


def _decisions(expected: Output, found: Output, task: TaskSpec) -> list[tuple[int, int]]:
    """Pairs of what each side decides for one sequence."""
    axis = {CLASSIFICATION: -1, TOKEN_CLASSIFICATION: -1, QUESTION_ANSWERING: 0}.get(task.kind)
    if axis is None:
        return []
    sides: Sequence[Any] = [np.atleast_1d(side.argmax(axis)).tolist() for side in (expected, found)]
    return list(zip(*sides, strict=True))


def _neighbours(session: Session, cases: Sequence[Case], pad: int, task: TaskSpec) -> tuple[float, float | None]:
    """The largest change of a row between its batch and alone, and the share of decisions that it flips, over the
    largest mixed batches."""
    mixed = [case for case in cases if len({len(one) for one in case.encodings}) > 1]
    changes, flips = [0.0], list[bool]()
    for case in sorted(mixed, key=lambda case: sum(map(len, case.encodings)))[-NEIGHBOURS:]:
        together = _rows(session, case, pad, task)
        for one, row in zip(case.encodings, together, strict=True):
            alone = _rows(session, Case((one,), len(one), left=False), pad, task)[0]
            changes.append(float(np.abs(alone - row).max()))
            flips += [a != b for a, b in _decisions(alone, row, task)]
    return float(np.max(changes)), sum(flips) / len(flips) if flips else None
