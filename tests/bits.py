"""Where two runs have the same bits, and where no promise can be made of it."""

from __future__ import annotations

import os

import pytest

same_bits = pytest.mark.skipif(
    "SSE" in os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
    reason="without AVX oneDNN's results depend on where memory lies: no two runs have the same bits",
)
