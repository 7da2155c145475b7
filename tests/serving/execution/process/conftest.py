"""One fork server for all tests of this folder: starting one means importing torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bertology_serve.serving.execution.executor_handle import ForkServer, WorkerOptions
from bertology_serve.serving.execution.remote import Remote
from bertology_serve.serving.versions.delta_registry import Registry


@pytest.fixture(scope="session")
def remote(encoder) -> Iterator[Remote]:
    with ForkServer(WorkerOptions(encoder.name)) as nursery:
        made = Remote(nursery, encoder.name)
        yield made
        made.close()


@pytest.fixture(scope="session")
def far(remote: Remote, deltas: Path) -> Registry:
    """The deltas of ``registry``, resident in another process."""
    made = Registry(remote)
    assert made.load(deltas) == []
    return made
