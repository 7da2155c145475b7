"""The alternatives answer as this server does; with servers of this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from bertology_serve.bench.prove import beside_alternatives, cores
from bertology_serve.bench.prove.stage import Stage
from bertology_serve.bench.serving.alternatives import alternatives_run, bench_tasks, fastapi_app, models
from bertology_serve.errors import SpecError, Unsupported, VerificationError
from bertology_serve.serving.http.listening import bind, url_of
from tests.serving.running import wait

PLAN = alternatives_run.Plan(tasks=2, many=3, rounds=1, seconds=0.2, clients=2, different=2)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def stage(encoder, tmp_path_factory) -> Stage:
    made = Stage(encoder.name, tmp_path_factory.mktemp("beside"), quick=True, pace=0.05)
    made._encoder.append(encoder)
    return made


@contextmanager
def near(command: list[str], environ: Any) -> Iterator[Any]:
    """One of the alternatives on a thread, as ``serving`` starts it in a process."""
    name, directory, base, count = command[-4:]
    made = fastapi_app.make(models.MODELS[name](bench_tasks.Made(Path(directory), Path(base), int(count))))
    with bind("127.0.0.1", 0) as bound:
        server = uvicorn.Server(uvicorn.Config(made, log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        wait(lambda: server.started)
        try:
            yield type("Near", (), {"url": url_of(bound), "pid": 0, "cpu": 1.0})()
        finally:
            server.should_exit = True
            thread.join(120)


@pytest.fixture
def servers(monkeypatch, encoder) -> None:
    from bertology_serve.encoder.pipeline import Pipeline
    from bertology_serve.serving.versions.delta_registry import Registry
    from tests.serving.running import running

    @contextmanager
    def ours(self: Stage, deltas: Path, *options: str, environ: Any = None) -> Iterator[Any]:
        registry = Registry(Pipeline(encoder), deltas)
        registry.load(deltas)
        with running(registry.pipeline, root=deltas, registry=registry) as started:
            yield type("Near", (), {"url": started.url, "pid": 0, "cpu": 1.0})()

    monkeypatch.setattr(Stage, "server", ours)
    monkeypatch.setattr(alternatives_run, "serving", near)
    monkeypatch.setattr(alternatives_run, "resident_bytes", lambda pid: 1000)
    monkeypatch.setattr(cores, "pair", lambda: None)


@pytest.mark.parametrize("faster", [True, False])
def test_all_answer_alike_and_are_measured(faster, stage, servers, tmp_path, monkeypatch):
    monkeypatch.setattr(alternatives_run, "pays", lambda dtype: faster)
    found = alternatives_run.compare(stage, PLAN)
    there = {key: name for key, name in alternatives_run.CONTENDERS.items() if faster or "bf16" not in key}
    assert {row.key: row.name for row in found.rows} == there
    assert all(row.texts_s > 0 and row.p50_ms <= row.p99_ms < 1e4 for row in found.rows)
    assert found.rate == pytest.approx(0.5 * min(row.texts_s for row in found.rows))
    assert not found.pinned
    alternatives_run.draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000

    monkeypatch.setattr(beside_alternatives, "Plan", lambda **_: PLAN)
    line = beside_alternatives.measure(stage)
    assert not line.holds, "the same memory for all"
    assert line.words.endswith("memory 1.00 of the pipelines' and 1.00 of the sessions'")

    monkeypatch.setattr(models, "LABELS", ("good", "bad", "so-so"))
    with pytest.raises(VerificationError, match="nothing was timed"):
        alternatives_run.compare(stage, PLAN)


def test_what_is_not_installed_is_told(stage, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="fastapi, peft, onnxruntime not installed"):
        alternatives_run.compare(stage, PLAN)
    line = beside_alternatives.measure(stage)
    assert not line.holds
    assert "bertology-serve[bench,cpu]" in line.words


def test_plans_that_make_no_sense():
    with pytest.raises(SpecError, match="tasks is 9"):
        alternatives_run.Plan(tasks=9, many=8)
    with pytest.raises(SpecError, match="share"):
        alternatives_run.Plan(share=1.0)
