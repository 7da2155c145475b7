"""The public functions: every analysis from data in memory, by ``bs.analysis``, without anything deeper."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bertology_serve as bs
from bertology_serve.analysis.subject_model import Subject
from bertology_serve.encoder.batch import read
from bertology_serve.errors import NotFound, SpecError, Unsupported
from bertology_serve.tasks.spec import Encoding, TaskSpec
from tests import tiny
from tests.training import sets

TASK = TaskSpec("classification", ("down", "up"), max_length=32)
ROWS = sets.classification()
TEXTS = ["the film was good", "a dog in the house", "the river was bad"]

Analyse = Callable[[bs.Encoder, bs.Delta, bs.Delta, Path], bs.analysis.AnalysisReport]
CAPTUM = pytest.mark.skipif(importlib.util.find_spec("captum") is None, reason="captum is an extra")


def heads(encoder: bs.Encoder, one: bs.Delta, other: bs.Delta, folder: Path) -> bs.analysis.AnalysisReport:
    return bs.analysis.heads(encoder, ROWS, bs.analysis.HeadSettings(steps=2, seeds=0), delta=one)


def prune(encoder: bs.Encoder, one: bs.Delta, other: bs.Delta, folder: Path) -> bs.analysis.AnalysisReport:
    settings = bs.analysis.PruneSettings(heads=0.5, rounds=1)
    return bs.analysis.prune(encoder, iter(ROWS), folder / "small", settings, delta=one)


FUNCTIONS: dict[str, tuple[Analyse, set[str]]] = {
    "attention": (lambda encoder, one, other, _: bs.analysis.attention(encoder, TEXTS), {"layer", "head", "entropy"}),
    "attention_maps": (
        lambda encoder, one, other, _: bs.analysis.attention_maps(encoder, TEXTS[:1], delta=one), {"layer", "from"},
    ),
    "dependencies": (lambda encoder, one, other, _: bs.analysis.dependencies(encoder), {"relation", "accuracy"}),
    "heads": (heads, {"layer", "head", "importance"}),
    "prune": (prune, {"layer", "heads", "neurons"}),
    "probe": (lambda encoder, one, other, _: bs.analysis.probe(encoder, ROWS), {"task", "layer", "selectivity"}),
    "distance": (lambda encoder, one, other, _: bs.analysis.distance(encoder, one, TEXTS), {"slot", "frobenius"}),
    "compare": (
        lambda encoder, one, other, _: bs.analysis.compare(
            one, other, iter(ROWS), bs.analysis.CompareSettings(attributions=False), encoder=encoder
        ),
        {"first", "second", "agree"},
    ),
    "compare_deltas": (
        lambda encoder, one, other, _: bs.analysis.compare_deltas([one, other], TEXTS, encoder=encoder),
        {"delta", "kind", "frobenius"},
    ),
}  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> tuple[bs.Encoder, bs.Delta, bs.Delta]:
    encoder = tiny.encoder("bert", tmp_path)
    one, other = (tiny.delta(encoder, f"d{seed}", [bs.Lora(rank=2)], TASK, seed=seed, size=0.5) for seed in (0, 1))
    return encoder, one, other


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_analysis_returns_a_table_and_draws_its_figure(name: str, made: tuple, tmp_path: Path) -> None:
    analyse, columns = FUNCTIONS[name]
    report = analyse(*made, tmp_path)
    assert isinstance(report, bs.analysis.AnalysisReport)
    assert columns <= report.table[0].keys()
    assert bs.analysis.AnalysisReport.from_dict(report.as_dict()).as_dict() == report.as_dict()
    if importlib.util.find_spec("matplotlib") is not None:
        assert report.plot(tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_is_not_there(made: tuple, tmp_path: Path) -> None:
    report = bs.analysis.dependencies(made[0])
    with pytest.raises(NotFound, match="did you mean 'dependencies'"):
        report.plot(tmp_path / "figure.png", "dependancies")


def test_what_is_public_is_there() -> None:
    assert {*FUNCTIONS, "attribution"} <= {*bs.analysis.__all__}
    for name in bs.analysis.__all__:
        assert getattr(bs.analysis, name).__doc__, name
        assert name in dir(bs.analysis)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bs.analysis.nothing  # noqa: B018


def test_the_functions_are_named_without_torch() -> None:
    code = "import sys, bertology_serve as bs; dir(bs.analysis); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@CAPTUM
def test_attributions_sum_to_what_the_text_changes(made: tuple) -> None:
    """By integrated gradients' completeness: to F(text) - F(all [PAD]) of the chosen class's logit."""
    encoder, delta, _ = made
    report = bs.analysis.attribution(encoder, ROWS, delta=delta, most=2, steps=64)
    subject = Subject(encoder, delta)
    tokenizer = encoder.tokenizer
    for number in (0, 1):
        rows = [row for row in report.table if row["record"] == number]
        ids = tokenizer(ROWS[number]["text"])["input_ids"]
        kept = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        logits = []
        for own in (ids, [i if i in kept else tokenizer.pad_token_id for i in ids]):
            batch = subject.pack([Encoding(tuple(own), (0,) * len(own))])
            with torch.inference_mode():
                logits.append(read(subject.run(batch), batch, [0], TASK, subject.head)[0])
        best = int(logits[0].argmax())
        assert {row["answer"] for row in rows} == {TASK.labels[best]}
        change = float(logits[0][best] - logits[1][best])
        assert sum(row["attribution"] for row in rows) == pytest.approx(change, abs=2 * rows[0]["missed"] + 1e-4)
        assert rows[0]["missed"] < 0.25 * max(1.0, abs(change))


def test_what_has_no_attribution(made: tuple) -> None:
    encoder, *_ = made
    if importlib.util.find_spec("captum") is not None:
        with pytest.raises(SpecError, match="--delta"):
            bs.analysis.attribution(encoder, ROWS)
        tags = TaskSpec("token-classification", ("O", "B-WHO"), max_length=32)
        with pytest.raises(Unsupported, match="not to those of token-classification"):
            bs.analysis.attribution(
                encoder, sets.token_classification(), delta=tiny.delta(encoder, "d", [bs.Lora()], tags)
            )
