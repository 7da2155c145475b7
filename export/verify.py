"""Runs an exported file beside the torch engine, in ONNX Runtime or OpenVINO; what does not agree is not published.

A file that passed may still need a warning: what a cast loses of the delta, or what neighbours change.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import rounding
from bertology_serve.errors import VerificationError
from bertology_serve.export.delta_library import Library
from bertology_serve.export.emitter.delta_inputs import INDEX
from bertology_serve.export.emitter.emit import EMBEDDING, TOKEN_LOGITS
from bertology_serve.export.export_spec import ExportSpec, Neighbours
from bertology_serve.export.hf_model import HfReference
from bertology_serve.export.samples import Case, Reference
from bertology_serve.export.session import Session
from bertology_serve.files import JsonObject
from bertology_serve.tasks import spec as tasks
from bertology_serve.tasks.spec import TaskSpec

Output = NDArray[np.float32]
NEIGHBOURS, SHORT = 4, 64
"""How many batches are run alone row by row, and shown to HuggingFace's model; and the longest of the latter."""


@dataclass(frozen=True)
class Tolerance:
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
    def of(cls, spec: ExportSpec, layers: int) -> Tolerance:
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
class Verification:
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
        shapes = len({one.shape for one in self.shapes})
        decided = "" if self.agreement is None else f", {self.agreement:.2%} of decisions the same"
        drifted = f"drift {self.drift:.2%} (allowed {self.max_drift:.2%}), " if self.max_drift else ""
        allowed = "" if self.max_drift else f" (allowed {self.atol:.1e}, outputs reach {self.scale:.3g})"
        beside = "".join(f"; {one.line()}" for one in self.witnesses)
        loses = ", ".join(f"{name} {share:.1%}" for name, share in (self.lost or {}).items())
        lost = f", a cast loses of the delta: {loses}" if loses else ""
        return (
            f"{'agrees' if self.passed else 'DIFFERS'}: {self.runtime} ({self.provider}) against torch, "
            f"{self.sequences} sequences in {shapes} shapes: {drifted}max |Δ| {self.largest:.1e}{allowed}, "
            f"mean {self.mean:.1e}{decided}, neighbours change a row by {self.neighbours:.1e}{lost}{beside}"
        )

    def as_dict(self) -> JsonObject:
        return {"passed": self.passed, **asdict(self)}


class VerifiedFile(ABC):
    """A file in its runtime beside the torch engine. Cases are counted, and each is the same one on both sides."""

    session: Session

    @abstractmethod
    def tasks(self, number: int, case: Case) -> list[TaskSpec]:
        """The task of each sequence."""

    @abstractmethod
    def expected(self, number: int, case: Case) -> list[Output]:
        """What torch answers to each sequence."""

    @abstractmethod
    def found(self, number: int, case: Case, row: int | None = None) -> list[Output]:
        """What the file answers to each sequence, padding left out; to that of one ``row`` alone, if given."""

    def verify(self, cases: Iterable[Case], tolerance: Tolerance) -> Verification:
        cases, compared = list(cases), list[Compared]()
        same, squares = list[bool](), np.zeros(2)
        for number, case in enumerate(cases):
            expected, found = self.expected(number, case), self.found(number, case)
            apart = np.concatenate([np.abs(one - other).ravel() for one, other in zip(expected, found, strict=True)])
            scale = max(float(np.abs(one).max()) for one in expected)
            compared.append(Compared(case.shape, float(apart.max()), float(apart.mean()), scale))
            squares += [_square(apart), sum(map(_square, expected))]
            answers = zip(expected, found, self.tasks(number, case), strict=True)
            same += [a == b for one, other, task in answers for a, b in _decisions(one, other, task)]
        (off, whole), scale = np.sqrt(squares).tolist(), float(np.max([one.scale for one in compared]))
        neighbours, flips = self._neighbours(cases)
        return Verification(
            runtime=self.session.runtime,
            provider=self.session.provider,
            atol=tolerance.output(scale),
            largest=float(np.max([one.largest for one in compared])),
            mean=float(np.mean([one.mean for one in compared])),
            agreement=sum(same) / len(same) if same else None,
            neighbours=neighbours,
            scale=scale,
            sequences=sum(len(case.encodings) for case in cases),
            shapes=tuple(compared),
            drift=off / whole if whole else math.inf if off else 0.0,
            max_drift=tolerance.max_drift,
            neighbours_allowed=tolerance.neighbour(scale),
            flips=flips,
            asked=self.session.asked,
        )

    def _neighbours(self, cases: Sequence[Case]) -> tuple[float, float | None]:
        """The largest change of a row between its batch and alone, and the share of decisions that it flips.

        Over the largest batches of several sequences.
        """
        several = [one for one in enumerate(cases) if len(one[1].encodings) > 1]
        changes, flips = [0.0], list[bool]()
        for number, case in sorted(several, key=lambda one: sum(map(len, one[1].encodings)))[-NEIGHBOURS:]:
            rows = zip(self.found(number, case), self.tasks(number, case), strict=True)
            for row, (together, task) in enumerate(rows):
                alone = self.found(number, case, row)[0]
                changes.append(float(np.abs(alone - together).max()))
                flips += [a != b for a, b in _decisions(alone, together, task)]
        return float(np.max(changes)), sum(flips) / len(flips) if flips else None


@dataclass(frozen=True)
class SingleFile(VerifiedFile):
    """The file of one delta; ``pad`` is the id that stands for padding."""

    session: Session
    reference: Reference
    pad: int

    def tasks(self, number: int, case: Case) -> list[TaskSpec]:
        return [self.reference.task] * len(case.encodings)

    def expected(self, number: int, case: Case) -> list[Output]:
        return [out.numpy() for out in self.reference.outputs(case.encodings)]

    def found(self, number: int, case: Case, row: int | None = None) -> list[Output]:
        case = case if row is None else case.alone(row)
        out, per_token = self.session.run(case.arrays(self.pad)), self.reference.task.per_token
        return [out[i, case.columns(i)] if per_token else out[i] for i in range(len(case.encodings))]


@dataclass(frozen=True)
class ManyDeltasFile(VerifiedFile):
    """The graph for many with its library, each sequence for a delta in turn.

    ``references`` are deltas whose ``numbers`` in the library are these.
    """

    session: Session
    library: Library
    references: Sequence[Reference]
    numbers: Sequence[int]
    pad: int

    def owners(self, number: int, case: Case) -> list[int]:
        """Which reference each sequence is for: each in turn, two neighbours now and then of the same one."""
        return [(number * 5 + row - row // 3) % len(self.references) for row in range(len(case.encodings))]

    def tasks(self, number: int, case: Case) -> list[TaskSpec]:
        return [self.references[owner].task for owner in self.owners(number, case)]

    def expected(self, number: int, case: Case) -> list[Output]:
        pairs = zip(self.owners(number, case), case.encodings, strict=True)
        return [self.references[owner].outputs([text])[0].numpy() for owner, text in pairs]

    def found(self, number: int, case: Case, row: int | None = None) -> list[Output]:
        owners = [self.numbers[owner] for owner in self.owners(number, case)]
        case, owners = (case, owners) if row is None else (case.alone(row), [owners[row]])
        index = {INDEX: np.array(owners, np.int64)}
        outputs = self.session.outputs(case.arrays(self.pad) | index | self.library.arrays)
        found = []
        for i, owner in enumerate(owners):
            card = self.library.cards[owner]
            own = outputs[card.output][i]
            own = own[case.columns(i)] if card.output == TOKEN_LOGITS else own
            found.append(own if card.output == EMBEDDING else own[..., : card.columns])
        return found


def witnesses(encoder: Encoder, delta: Delta, reference: Reference, cases: Sequence[Case]) -> tuple[Witness, ...]:
    """The torch engine beside HuggingFace's own model, on the largest batches of short sequences.

    Empty where there is no such model of the delta.
    """
    theirs = HfReference.of(encoder, delta)
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
    return float(np.square(values, dtype=np.float64).sum())


def check(report: Verification) -> None:
    """Raises VerificationError unless the report passed."""
    if not report.passed:
        worst = max(report.shapes, key=lambda one: (np.isnan(one.largest), one.largest))
        raise VerificationError(f"{report.line()}; worst at {worst.shape}; nothing was published: {report.wrong}")


TINY = 1e-12


def _decisions(expected: Output, found: Output, task: TaskSpec) -> list[tuple[int, int]]:
    """Pairs of what each side decides for one sequence."""
    if task.kind == tasks.MULTI_LABEL:
        least = np.clip(task.thresholds or tasks.EVEN, TINY, 1 - TINY)
        odds = np.log(least) - np.log1p(-least)
        return list(zip((expected >= odds).tolist(), (found >= odds).tolist(), strict=True))
    axis = {tasks.CLASSIFICATION: -1, tasks.TOKEN_CLASSIFICATION: -1, tasks.QUESTION_ANSWERING: 0}.get(task.kind)
    if axis is None:
        return []
    ours, theirs = (np.atleast_1d(side.argmax(axis)).tolist() for side in (expected, found))
    return list(zip(ours, theirs, strict=True))


LOSS = 0.1
"""Share of a delta from which its loss in a cast is worth a warning."""


def cautions(spec: ExportSpec, report: Verification) -> tuple[str, ...]:
    """Sentences without a full stop, most important first."""
    found = []
    if spec.neighbours == "anything":
        flips = "" if report.flips is None else f" and {report.flips:.1%} of decisions"
        found.append(
            f"answers depend on the rest of the batch: neighbours changed a row by up to {report.neighbours:.2g}"
            f"{flips}; --precision int8-row does not let them"
        )
    lost = report.lost or {}
    if spec.precision == "fp16" and lost.get("float16", 0.0) > LOSS:
        found.append(f"float16 loses {lost['float16']:.0%} of the delta; leave out --merge, or take --precision fp32")
    later = [kind for kind, share in lost.items() if share > LOSS and (spec.precision, kind) != ("fp16", "float16")]
    if later:
        shares = " and ".join(f"to {kind} {lost[kind]:.0%}" for kind in later)
        found.append(f"a cast of these merged weights loses of the delta: {shares}; leave out --merge if you mean to")
    if report.asked and report.asked != report.provider:
        found.append(f"{report.asked} was asked for, but {report.provider} ran; bertology-serve doctor says why")
    return tuple(found)


HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def lost(base: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> dict[str, float] | None:
    """``‖(cast(W + Δ) - cast(W)) - Δ‖ / ‖Δ‖`` over all weights that a delta changed, by the type cast to.

    ``base`` holds W and ``merged`` W + Δ, by the same names; what ``base`` lacks is zero there. Near zero, the cast
    model still has the delta; at 1, it might as well be the base. ``None`` where nothing changed.
    """
    gone, whole = dict.fromkeys(HALVES, 0.0), 0.0
    for name, after in merged.items():
        before = base.get(name)
        if not after.is_floating_point() or (before is not None and before.data_ptr() == after.data_ptr()):
            continue
        before = torch.zeros_like(after) if before is None else before.detach().to("cpu", torch.float32)
        delta = after.double() - before.double()
        whole += float(delta.square().sum())
        for kind, half in HALVES.items():
            kept = after.to(half).double() - before.to(half).double()
            gone[kind] += float((kept - delta).square().sum())
    return {kind: (part / whole) ** 0.5 for kind, part in gone.items()} if whole else None
