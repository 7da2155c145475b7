from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bertology_serve.serving.execution import startup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")
BIG = 1 << 20


def mapped(path: Path) -> torch.Tensor:
    """A file of 4 MB, as torch maps weights."""
    save_file({"weight": torch.arange(BIG, dtype=torch.float32)}, path)
    return torch.from_file(str(path), size=BIG, dtype=torch.float32)


def inside(tensor: torch.Tensor) -> bool:
    return any(start <= tensor.data_ptr() < end for start, end in startup._unchanged())


def test_weights_that_were_only_read_are_found_and_can_be_read_again(tmp_path: Path) -> None:
    weights = mapped(tmp_path / "model.safetensors")
    before = weights.sum()
    assert inside(weights)
    libc = ctypes.CDLL(None)
    for start, end in startup._unchanged():
        assert libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), startup._DONTNEED) == 0
    assert weights.sum() == before


def test_weights_that_were_changed_in_memory_are_left_alone(tmp_path: Path) -> None:
    weights = mapped(tmp_path / "model.safetensors")
    weights[0] = 7.0
    assert not inside(weights)
    assert weights[0] == 7.0


def test_memory_that_is_shared_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "shared.bin"
    path.write_bytes(bytes(4 * BIG))
    assert not inside(torch.from_file(str(path), shared=True, size=BIG, dtype=torch.float32))
