"""The packaged MiniLM as an encoder, loaded once."""

from __future__ import annotations

import pytest

from bertology_serve.encoder.encoder import Encoder


@pytest.fixture(scope="session")
def minilm() -> Encoder:
    """all-MiniLM-L6-v2."""
    return Encoder.load("minilm")
