from __future__ import annotations

import os
import sys

import pytest

from bertology_serve.cli.common import POLICY, SHORT, SPINS, share_cores


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """As in a fresh process; what is set is taken back."""
    for name in (SPINS, POLICY):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def test_threads_spin_shortly():
    assert share_cores()
    assert os.environ[SPINS] == SHORT


@pytest.mark.parametrize("name", [SPINS, POLICY])
def test_what_the_user_said_stays(monkeypatch, name):
    monkeypatch.setenv(name, "7")
    assert not share_cores()
    assert os.environ[name] == "7"


def test_too_late_once_torch_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    assert not share_cores()
    assert SPINS not in os.environ
