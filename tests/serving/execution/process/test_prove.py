"""Figure 10 in very small, and that it sees what it is there to see."""

from __future__ import annotations

import dataclasses
import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from bertology_serve.bench.prove import crashes
from bertology_serve.bench.prove.cores import descendants
from bertology_serve.bench.prove.stage import ADMIN, Stage
from bertology_serve.serving.execution.remote import Remote
from bertology_serve.serving.keys import Key, Keyring, digest_of
from bertology_serve.serving.versions.delta_registry import Registry
from tests.serving.running import running


@pytest.fixture
def stage(encoder, remote, far, deltas, tmp_path, monkeypatch):
    made = Stage(encoder.name, tmp_path, quick=True, pace=0.4)
    made._encoder.append(encoder)

    @contextmanager
    def server(self, root, *options):
        assert options == ("--executor", "process")
        registry = Registry(remote)
        registry.load(root)
        with running(remote, Keyring([Key("admin", digest_of(ADMIN, ""), admin=True)]), registry=registry) as started:
            yield SimpleNamespace(url=started.url.rstrip("/"), process=SimpleNamespace(pid=os.getpid()))

    monkeypatch.setattr(Stage, "server", server)
    yield made
    far.load(deltas)


def test_crashes(stage, remote, monkeypatch):
    monkeypatch.setattr(crashes, "BOUND", crashes.LONGEST)  # how fast it comes back is the figure's, not the test's
    found = crashes.measure(stage)
    assert found.holds, found.words
    assert len(found.facts["ready_seconds"]) == 2
    assert found.facts["answered"] > 0
    outputs = Remote.outputs
    monkeypatch.setattr(Remote, "outputs", lambda self, owned: [output + 1 for output in outputs(self, owned)])
    wrong = crashes.measure(dataclasses.replace(stage, pace=0.2, _encoder=stage._encoder))
    assert wrong.facts["wrong"] > 0
    assert not wrong.holds


def test_families(remote):
    family = descendants(os.getpid())
    assert remote.supervisors[0].pid in family
    assert family.index(remote.supervisors[0].pid) > family.index(remote.supervisors[0]._nursery._process.pid)
    assert descendants(remote.supervisors[0].pid) == []
