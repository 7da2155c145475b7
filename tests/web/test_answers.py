"""What the package in ``web/`` answers, in Node and in Chromium, beside this one: mixed batches of all there is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.export import exporting
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import export_many
from tests import tiny
from tests.export.cases import small
from tests.export.emitter.mixed import EVERY, FAMILIES
from tests.web.browser import chromium, told_by
from tests.web.conftest import HERE, Ask
from tests.web.requests import TEXTS, answers, deltas, furthest, requests

SAME = 1e-5


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = exporting.built_in
    monkeypatch.setattr(exporting, "built_in", lambda tokenizer, longest: list(real(tokenizer, longest))[::9])


def check(encoder: Encoder, made: list[Delta], asked: list[dict[str, Any]], found: Any) -> None:
    assert isinstance(found, list), found
    for request, own, expected in zip(asked, found, answers(encoder, made, asked), strict=True):
        assert furthest(own, expected, str(request)) <= SAME, (request, own, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_and_task(family: str, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoder = small(family, tmp_path / "encoder", monkeypatch)
    made = deltas(encoder)
    export_many(encoder, made, tmp_path / "out", ExportSpec(layout="web"))
    asked = list(requests(made))
    check(encoder, made, asked, ask(tmp_path / "out", asked)[0][0])


def test_minilm_in_node_and_in_chromium(ask: Ask, built: Path, tmp_path: Path, minilm_path: Path):
    """A real encoder, with a real tokenizer."""
    encoder = Encoder.load(str(minilm_path))
    made = deltas(encoder, size=0.02)
    export_many(encoder, made, tmp_path / "export", ExportSpec(layout="web"))
    asked = list(requests(made))
    check(encoder, made, asked, ask(tmp_path / "export", asked)[0][0])
    chromium()
    for file in (*(built / "demo").iterdir(), HERE / "page.html", HERE / "page.js"):
        shutil.copy(file, tmp_path)
    (tmp_path / "requests.json").write_text(json.dumps([asked]), encoding="utf-8")
    check(encoder, made, asked, told_by(tmp_path, "page.html", tmp_path / "profile"))


def test_eight_bits(ask: Ask, tmp_path: Path, minilm_path: Path):
    """The same decisions as the file has in ONNX Runtime's other kernels, and numbers as near as 8 bits let them be."""
    encoder = Encoder.load(str(minilm_path))
    made = [tiny.delta(encoder, "folds", *EVERY["folds"], size=0.02)]
    done = export_many(encoder, made, tmp_path / "out", ExportSpec(layout="web", precision="int8-row"))
    asked = [{"delta": name, "text": text} for name in ("folds", "base") for text in TEXTS]
    [[found, _]] = ask(tmp_path / "out", asked)
    for own, expected in zip(found, answers(encoder, made, asked), strict=True):
        assert own.get("label") == expected.get("label")
        assert furthest(own, expected) <= done.report.max_drift
