"""What the package in ``web/`` answers in Node, beside this one: every family, kind and task, in mixed batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from bertology_serve.export import exporting
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import export_many
from tests.export.cases import small
from tests.export.emitter.mixed import FAMILIES
from tests.web.conftest import Ask
from tests.web.requests import answers, deltas, furthest, requests

SAME = 1e-5


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = exporting.built_in
    monkeypatch.setattr(exporting, "built_in", lambda tokenizer, longest: list(real(tokenizer, longest))[::9])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_and_task(family: str, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoder = small(family, tmp_path / "encoder", monkeypatch)
    made = deltas(encoder)
    export_many(encoder, made, tmp_path / "out", ExportSpec(layout="web"))
    asked = list(requests(made))
    [found] = ask(tmp_path / "out", asked)
    assert isinstance(found, list), found
    for request, own, expected in zip(asked, found, answers(encoder, made, asked), strict=True):
        assert furthest(own, expected, str(request)) <= SAME, (request, own, expected)
