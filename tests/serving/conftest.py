"""One tiny encoder with a delta of every task, for all tests of this floor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bertology_serve.deltas import store
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.serving.running import Running, running

TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
DELTAS: dict[str, tuple[list[Any], TaskSpec]] = {
    "mood": ([Lora(rank=2)], TaskSpec("classification", ("bad", "good", "so-so"), 32)),
    "topics": (
        [Bitfit("attention")],
        TaskSpec("multi-label", ("film", "food", "sport"), 32, thresholds=(0.6, 0.5, 0.01)),
    ),
    "grade": ([Bitfit()], TaskSpec("regression", max_length=32)),
    "names": ([Adapter(width=4)], TaskSpec("token-classification", TAGS, 32)),
    "finder": ([Prefix(3)], TaskSpec("question-answering", max_length=24, stride=4)),
    "chooser": ([Prompt(2)], TaskSpec("multiple-choice", max_length=32)),
    "sense": ([Lora(("key",), rank=3)], TaskSpec("embedding", head="none", pooling="mean", max_length=32)),
    "labels": ([Bitfit()], TaskSpec("zero-shot", ("good", "bad"), 32, "mean", "none")),
    "raw": ([], TaskSpec("embedding", head="none", max_length=32, normalize=False)),
    "words": ([Lora(rank=2)], TaskSpec("sparse", max_length=32, width=len(tiny.WORDS) + len(tiny.SPECIAL))),
    "late": ([], TaskSpec("multi-vector", max_length=32, width=8)),
}
RECORDS: dict[str, dict[str, Any]] = {
    "mood": {"text": "the cat was good"},
    "topics": {"text": "a good film"},
    "grade": {"text": "the dog", "text_pair": "a cat"},
    "names": {"tokens": ["Ada", "went", "to", "Paris"]},
    "finder": {"question": "where was the dog ?", "context": "Ada met the dog in London . the cat was in the house"},
    "chooser": {"premise": "the river was cold", "choices": ["the house", "a very cold river bank"]},
    "sense": {"text": "money was not very good"},
    "labels": {"text": "the river was very cold", "labels": ["cold_river", "house", "money"]},
    "raw": {"text": "a great film"},
    "words": {"text": "the great film"},
    "late": {"text": "a film , not great", "text_pair": "the dog ."},
    "base": {"text": "the red house"},
}


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return tiny.encoder("bert", tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="session")
def deltas(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of one delta of every task, each NAME/1."""
    root = tmp_path_factory.mktemp("deltas")
    for seed, (name, (specs, task)) in enumerate(DELTAS.items()):
        delta = tiny.delta(encoder, name, specs, task, seed)
        store.save(delta, root / name / "1", encoder.anatomy, encoder.config.to_dict())
    return root


@pytest.fixture(scope="session")
def registry(encoder: Encoder, deltas: Path) -> Registry:
    made = Registry(Pipeline(encoder))
    assert made.load(deltas) == []
    return made


@pytest.fixture(scope="session")
def pipeline(registry: Registry) -> Pipeline:
    return registry.pipeline


@pytest.fixture(scope="session")
def server(pipeline: Pipeline) -> Iterator[Running]:
    with running(pipeline) as started:
        yield started


def save_version(encoder: Encoder, root: Path, name: str, version: str, seed: int, like: str = "mood") -> None:
    delta = tiny.delta(encoder, name, *DELTAS[like], seed)
    store.save(delta, root / name / version, encoder.anatomy, encoder.config.to_dict())


@pytest.fixture
def root(encoder, tmp_path) -> Path:
    """Two versions of one delta, of different kinds and labels, and a delta beside it."""
    save_version(encoder, tmp_path, "mood", "1", 1)
    save_version(encoder, tmp_path, "mood", "2", 2, like="names")
    save_version(encoder, tmp_path, "grade", "1", 3, like="grade")
    return tmp_path


@pytest.fixture
def made(encoder, root) -> Registry:
    return Registry(Pipeline(encoder), root)


@pytest.fixture
def hub_session() -> Iterator[None]:
    """The tests' offline mode forbids this client even the loopback; a session without that hook does not."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    set_client_factory(lambda: httpx.Client(timeout=120))
    yield
    set_client_factory(default_client_factory)
