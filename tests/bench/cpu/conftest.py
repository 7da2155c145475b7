from __future__ import annotations

import pytest
import torch

from bertology_serve.bench.cpu import contenders, cpu_run, subject
from bertology_serve.bench.cpu.contenders import DENSE, UNPADDED, UNPADDED_ROW
from bertology_serve.kinds.lora import Lora
from tests import tiny
from tests.bench.cpu.in_process import InProcess
from tests.export.cases import CLASSES


@pytest.fixture
def encoder(tmp_path):
    return tiny.encoder("bert", tmp_path / "base")


@pytest.fixture
def delta(encoder):
    return tiny.delta(encoder, "mood", [Lora(rank=2)], CLASSES)


AGAIN = f"{UNPADDED}, again"


@pytest.fixture
def small(monkeypatch):
    """Three exported forms, few and small deltas, and workers in this process."""
    monkeypatch.setitem(contenders.FORMS, AGAIN, contenders.FORMS[UNPADDED])
    forms = {name: contenders.FORMS[name] for name in (DENSE, UNPADDED, AGAIN, UNPADDED_ROW)}
    monkeypatch.setattr(subject, "FORMS", forms)
    taking = tuple(one for one in contenders.CONTENDERS if one.name not in contenders.FORMS.keys() - forms)
    monkeypatch.setattr(contenders, "CONTENDERS", (contenders._exported(AGAIN), *taking))
    monkeypatch.setattr(subject, "DELTAS", {contenders.LORA8: (8, 2, (Lora(rank=2),))})
    monkeypatch.setattr(cpu_run, "WorkerProcess", InProcess)
    monkeypatch.setattr(cpu_run, "AT_LEAST", 0.0)
    monkeypatch.setattr(InProcess, "asked", [])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
