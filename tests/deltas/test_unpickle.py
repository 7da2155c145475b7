from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bertology_serve.deltas.unpickle import convert_pickle
from bertology_serve.errors import FormatError, NotFound


class Bomb:
    """Runs code when unpickled, if anything lets it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.path),)  # type: ignore[return-value]

    path = ""


def test_tensors_come_over(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.ones(1)}
    torch.save({**tensors, "c": tensors["a"]}, tmp_path / "adapter_model.bin")
    written = load_file(convert_pickle(tmp_path))
    assert torch.equal(written["c"], tensors["a"])
    assert not list(tmp_path.glob("*.tmp"))


def test_code_is_not_run(tmp_path: Path) -> None:
    Bomb.path = str(tmp_path / "ran")
    torch.save({"a": Bomb()}, tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match="more than tensors"):
        convert_pickle(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("values", [{"a": 3}, [torch.ones(1)]])
def test_other_values_are_refused(tmp_path: Path, values: object) -> None:
    torch.save(values, tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match="no table of tensors"):
        convert_pickle(tmp_path)


def test_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"adapter_model\.bin"):
        convert_pickle(tmp_path)
