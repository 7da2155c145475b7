from __future__ import annotations

import os
import sys

import pytest

from bertology_serve.cli.threads import POLICY, share_cores


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """As in a fresh process; what is set is taken back."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def test_threads_sleep_while_they_wait():
    assert share_cores()
    assert os.environ[POLICY] == "PASSIVE"


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_said_stays(monkeypatch, name):
    monkeypatch.setenv(name, "7")
    assert not share_cores()
    assert os.environ[name] == "7"


def test_too_late_once_torch_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    assert not share_cores()
    assert POLICY not in os.environ
