"""A small random BERT on disk, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from bertology_serve.encoder.encoder import Encoder
from tests import tiny


@pytest.fixture(scope="session")
def bert_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the encoder."""
    return Path(tiny.save("bert", tmp_path_factory.mktemp("bert")))


@pytest.fixture
def bert(bert_path: Path) -> Encoder:
    """The encoder, loaded anew for each test: full fine-tuning changes it."""
    return Encoder.load(str(bert_path))
