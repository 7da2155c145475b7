"""One fork server for all tests of this folder: starting one means importing torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bertology_serve.serving.process.forks import Nursery
from bertology_serve.serving.process.plan import Plan
from bertology_serve.serving.process.remote import Remote
from bertology_serve.serving.registry import Registry


@pytest.fixture(scope="session")
def remote(encoder) -> Iterator[Remote]:
    with Nursery(Plan(encoder.name)) as nursery:
        made = Remote(nursery, encoder.name)
        yield made
        made.close()


@pytest.fixture(scope="session")
def far(remote: Remote, deltas: Path) -> Registry:
    """The deltas of ``registry``, resident in another process."""
    made = Registry(remote)
    assert made.load(deltas) == []
    return made
