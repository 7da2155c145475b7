from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from bertology_serve.errors import VerificationError
from bertology_serve.export.export_spec import CPU, CUDA, ExportSpec
from bertology_serve.export.samples import Case
from bertology_serve.export.verify import SingleFile, Tolerance, Verification, Witness, cautions, check, lost
from bertology_serve.tasks.spec import Encoding, TaskSpec

BARS = Tolerance(layers=2, atol=1e-5)
CLASSES = TaskSpec("classification", ("a", "b"))


class Reference:
    """Answers the length of a sequence, and 2."""

    def __init__(self, task=CLASSES):
        self.task = task

    def outputs(self, encodings):
        rows = [torch.tensor([float(len(one)), 2.0]) for one in encodings]
        return (
            [row.expand(len(one), 2) for row, one in zip(rows, encodings, strict=True)] if self.task.per_token else rows
        )


class Session:
    """The same from the mask, ``off`` added to rows of batches that hold several."""

    asked, provider, runtime = "TestProvider", "TestProvider", "onnxruntime 0.0"

    def __init__(self, off=0.0, per_token=False):
        self.off, self.per_token = off, per_token

    def run(self, arrays):
        lengths = arrays["attention_mask"].sum(1)
        off = self.off if len(lengths) > 1 else 0.0
        out = np.stack([lengths + off, np.full(len(lengths), 2.0)], 1).astype(np.float32)
        if not self.per_token:
            return out
        return np.where(arrays["attention_mask"][..., None] == 1, out[:, None], np.nan)


def case(*lengths, left=False):
    return Case(tuple(Encoding((5,) * n, (0,) * n) for n in lengths), max(lengths), left)


def verify(session, reference, cases, pad, tolerance) -> Verification:
    return SingleFile(session, reference, pad).verify(cases, tolerance)


CASES = [case(1), case(3, 1), case(1, 4, left=True), case(7)]


def test_agreement_is_reported():
    report = verify(Session(), Reference(), CASES, 0, BARS)
    assert report.passed
    assert (report.largest, report.mean, report.neighbours, report.scale) == (0, 0, 0, 7)
    assert (report.sequences, report.agreement) == (6, 1.0)
    assert [one.shape for one in report.shapes] == ["1×1 right", "2×3 right", "2×4 left", "1×7 right"]
    assert report.line().startswith("agrees: onnxruntime 0.0 (TestProvider) against torch, 6 sequences in 4 shapes: ")
    assert report.as_dict()["passed"] is True
    check(report)


@pytest.mark.parametrize("off", [1.5, 1e-4, float("nan"), float("inf")])
def test_what_differs_is_found_and_named(off):
    report = verify(Session(off), Reference(), CASES, 0, BARS)
    assert not report.passed
    assert report.neighbours == pytest.approx(off, rel=0.01, nan_ok=True)
    assert report.largest == pytest.approx(off, rel=0.01, nan_ok=True)
    with pytest.raises(
        VerificationError, match=r"^DIFFERS: .*outputs reach 7\).*worst at 2×[34] (left|right); nothing was published"
    ):
        check(report)


def test_decisions_that_flip_are_counted():
    report = verify(Session(1.5), Reference(), CASES, 0, BARS)
    assert report.agreement == pytest.approx(4 / 6)  # lengths 1 of the two mixed batches become 2.5 > 2


@pytest.mark.parametrize(("thresholds", "agreement"), [((0.9, 0.9), 10 / 12), ((0.5, 0.5), 1.0), ((0.0, 1.0), 1.0)])
def test_each_of_several_labels_is_decided_by_its_threshold(thresholds, agreement):
    """0.9 is a logit of 2.2: two lengths of 1 become 2.5."""
    task = TaskSpec("multi-label", ("a", "b"), thresholds=thresholds)
    assert verify(Session(1.5), Reference(task), CASES, 0, BARS).agreement == pytest.approx(agreement)


@pytest.mark.parametrize(
    ("kind", "agreement"),
    [("token-classification", 1.0), ("question-answering", 1.0), ("regression", None), ("multiple-choice", None)],
)
def test_padding_is_not_compared_and_only_decisions_are_counted(kind, agreement):
    task = TaskSpec(kind, ("O", "B-X") if kind == "token-classification" else ())
    report = verify(Session(per_token=task.per_token), Reference(task), CASES, 0, BARS)
    assert report.passed
    assert report.agreement == agreement


@pytest.mark.parametrize(("allowed", "passes"), [(0.3, True), (0.1, False)])
def test_drift_counts_where_it_is_allowed(allowed, passes):
    """A session that adds 1 to each first output: ‖Δ‖ = √4 of the four cases' norms."""

    class Off(Session):
        def run(self, arrays):
            return super().run(arrays) + np.array([1.0, 0.0], dtype=np.float32)

    report = verify(Off(), Reference(), CASES, 0, replace(BARS, max_drift=allowed))
    expected = np.sqrt(6 / sum(n * n + 4 for n in (1, 3, 1, 1, 4, 7)))
    assert report.drift == pytest.approx(expected)
    assert report.passed is passes
    assert f"drift {expected:.2%} (allowed {allowed:.2%})" in report.line()
    if not passes:
        with pytest.raises(VerificationError, match="give a larger --max-drift if that will do, or leave out --precis"):
            check(report)


@pytest.mark.parametrize(("neighbours", "allowed"), [("nothing", 1e-5), ("rounding", 0.7), ("anything", None)])
@pytest.mark.parametrize("off", [1e-6, 0.3, 1.5])
def test_neighbours_change_no_more_than_is_allowed(neighbours, allowed, off):
    """Outputs reach 7, so a drift of 10 % lets rounding change 0.7."""
    report = verify(Session(off), Reference(), CASES, 0, replace(BARS, max_drift=0.1, neighbours=neighbours))
    assert report.neighbours_allowed == (pytest.approx(allowed) if allowed else None)
    assert report.passed == (report.drift <= 0.1 and (allowed is None or off <= allowed))
    assert report.flips == pytest.approx(2 / 4 if off > 1 else 0)
    json.loads(json.dumps(report.as_dict(), allow_nan=False))


def test_what_a_cast_loses_is_in_the_line():
    report = verify(Session(), Reference(), CASES, 0, BARS)
    assert "loses" not in report.line()
    lost = replace(report, lost={"float16": 0.012, "bfloat16": 0.4})
    assert lost.line().endswith(", a cast loses of the delta: float16 1.2%, bfloat16 40.0%")
    assert lost.as_dict()["lost"] == {"float16": 0.012, "bfloat16": 0.4}


def test_no_drift_excuses_neighbours():
    report = verify(Session(1e-3), Reference(), CASES, 0, replace(BARS, max_drift=0.1))
    assert report.drift < 0.1
    assert not report.passed
    assert not verify(Session(float("nan")), Reference(), CASES, 0, replace(BARS, max_drift=0.1)).passed


class Alone(Session):
    """A session whose answers to sequences of 7 tokens are no numbers; neighbours are compared elsewhere."""

    def run(self, arrays):
        return np.where(arrays["attention_mask"].sum(1)[:, None] == 7, np.float32("nan"), super().run(arrays))


@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_nan_never_passes_and_is_named(drift):
    """In the differences alone: what neighbours change is a number."""
    report = verify(Alone(), Reference(), CASES, 0, replace(BARS, max_drift=drift))
    assert report.neighbours == 0
    assert not report.passed
    with pytest.raises(VerificationError, match="worst at 1×7 right"):
        check(report)


@pytest.mark.parametrize("field", ["largest", "drift", "neighbours"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_every_bar_is_missed_by_what_is_no_number(field, value, drift):
    report = verify(Session(), Reference(), CASES, 0, replace(BARS, max_drift=drift))
    counts = field == "neighbours" or (field == "drift") == bool(drift)
    assert replace(report, **{field: value}).passed is not counts
    assert not replace(report, witnesses=(Witness("other", 1, value, 1.0),)).passed


def test_torch_of_zeros_agrees_with_nothing_else():
    class Zero(Reference):
        def outputs(self, encodings):
            return [torch.zeros(2) for _ in encodings]

    bars = replace(BARS, max_drift=0.1)
    assert verify(Session(), Zero(), CASES, 0, bars).drift == float("inf")
    assert not verify(Session(), Zero(), CASES, 0, bars).passed


def test_float32_may_round_more_in_deeper_encoders_and_larger_outputs():
    """1e-5 where outputs reach 10 is one part in a million: no fault of six layers."""
    assert Tolerance(6).output(10.0) == pytest.approx(1.5e-4, rel=0.05)
    assert Tolerance(6).output(0.1) == Tolerance(6).output(1.0) == pytest.approx(1.5e-5, rel=0.05)
    assert Tolerance(12).output(6.8) == pytest.approx(1.8e-4, rel=0.05)
    report = verify(Session(5e-5), Reference(), CASES, 0, Tolerance(6))
    assert report.passed
    assert "(allowed 1.1e-04, outputs reach 7)" in report.line()
    assert not verify(Session(2e-4), Reference(), CASES, 0, Tolerance(6)).passed


def test_what_neighbours_change_too_much_is_said_with_advice_that_helps():
    report = verify(Session(1e-3), Reference(), CASES, 0, replace(BARS, max_drift=0.1))
    with pytest.raises(VerificationError, match=r"neighbours may change a row by 1.0e-05; leave out --precision$"):
        check(report)


def test_a_witness_that_disagrees_is_named():
    report = verify(Session(), Reference(), CASES, 0, BARS)
    one = Witness("transformers' BertForX", 8, 0.25, 1e-5)
    assert replace(report, witnesses=(replace(one, largest=1e-6),)).passed
    with pytest.raises(
        VerificationError, match=r"torch against transformers' BertForX, 8 sequences: max \|Δ\| 2.5e-01"
    ):
        check(replace(report, witnesses=(one,)))


REPORT = Verification("onnxruntime 1", CPU, 1e-5, 1e-7, 1e-8, 1.0, 0.25, 2.5, 3, (), asked=CPU)


@pytest.mark.parametrize(
    ("spec", "changes", "said"),
    [
        ({}, {}, []),
        ({}, {"lost": {"float16": 0.01, "bfloat16": 0.08}}, []),
        ({}, {"lost": {"float16": 0.01, "bfloat16": 0.4}}, ["a cast of these .* to bfloat16 40%; "]),
        (
            {"precision": "fp16"},
            {"lost": {"float16": 0.2, "bfloat16": 0.7}},
            ["float16 loses 20% of the delta; leave out --merge", "a cast of these .* to bfloat16 70%; "],
        ),
        ({"precision": "int8-dynamic"}, {"flips": 0.016}, ["up to 0.25 and 1.6% of decisions; --precision int8-row"]),
        ({"precision": "int8-dynamic"}, {}, ["up to 0.25; --precision int8-row does not let them"]),
        ({"target": "cuda"}, {"asked": CUDA}, [f"{CUDA} was asked for, but {CPU} ran; bertology-serve doctor"]),
    ],
)  # fmt: skip
def test_what_is_worth_saying(spec, changes, said):
    found = cautions(ExportSpec(**spec), replace(REPORT, **changes))
    assert len(found) == len(said)
    for sentence, expected in zip(found, said, strict=True):
        assert re.search(expected, sentence)


def weights(size: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A weight and the same with a random change of that size beside it, relative to the weight."""
    generator = torch.Generator().manual_seed(1)
    weight, change = (torch.randn(200, 100, generator=generator) for _ in range(2))
    return {"w": weight, "ids": torch.arange(3)}, {"w": weight + size * change, "ids": torch.arange(3)}


@pytest.mark.parametrize("size", [1e-1, 3e-3, 1e-5])
def test_against_the_definition(size):
    base, merged = weights(size)
    delta = merged["w"].double() - base["w"].double()
    for name, kind in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        kept = merged["w"].to(kind).double() - base["w"].to(kind).double()
        expected = float((kept - delta).norm() / delta.norm())
        found = lost(base, merged)
        assert found is not None
        assert found[name] == pytest.approx(expected, rel=1e-9)


def test_small_deltas_are_lost_and_large_ones_are_not():
    large, small = lost(*weights(1.0)), lost(*weights(1e-3))
    assert large["float16"] < 1e-3
    assert large["bfloat16"] < 0.01
    assert small["bfloat16"] > 0.5
    assert small["float16"] < 0.5 < 10 * small["float16"] < 5


def test_nothing_changed_and_what_the_base_lacks():
    base, _ = weights(0.1)
    assert lost(base, dict(base)) is None
    found = lost(base, base | {"b": torch.full((4,), 1 / 3)})
    assert 0 < found["float16"] < 2**-11
