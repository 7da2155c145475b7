from __future__ import annotations

import contextlib
import random
import warnings
from pathlib import Path

import pytest
import torch

from bertology_serve.deltas.interop.microsoft import read_pickle
from bertology_serve.errors import FormatError, NotFound


class Bomb:
    """Runs code when unpickled, if anything lets it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.path),)  # type: ignore[return-value]

    path = ""


def test_tensors_come_over(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.ones(1)}
    torch.save({**tensors, "c": tensors["a"]}, tmp_path / "adapter_model.bin")
    found = read_pickle(tmp_path / "adapter_model.bin")
    assert found.keys() == {"a", "b", "c"}
    assert torch.equal(found["c"], tensors["a"])


def test_code_is_not_run(tmp_path: Path) -> None:
    Bomb.path = str(tmp_path / "ran")
    torch.save({"a": Bomb()}, tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match="more than tensors"):
        read_pickle(tmp_path / "adapter_model.bin")
    assert not (tmp_path / "ran").exists()


VALUES: dict[str, object] = {
    "number": {"a": 3},
    "list": [torch.ones(1)],
    "number as a name": {1: torch.ones(1)},
    "sparse": {"a": torch.ones(2, 2).to_sparse()},
    "without data": {"a": torch.ones(2, device="meta")},
    "complex": {"a": torch.ones(2, dtype=torch.complex64)},
    "a terabyte of one number": {"a": torch.ones(1).expand(1 << 38)},
}
DAMAGED = {
    "nothing": b"",
    "text": b"hello world\n",
    "pops nothing": b"\x80\x99.",
    "asks for nothing": b"h\x05.",
    "endless frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",
    "zip of nothing": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_other_values_are_refused(tmp_path: Path, values: object) -> None:
    torch.save(values, tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match="no table of tensors"):
        read_pickle(tmp_path / "adapter_model.bin")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"adapter_model\.bin"):
        read_pickle(tmp_path / "adapter_model.bin")


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_what_is_damaged_is_told_in_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(data)
    with pytest.raises(FormatError, match="is damaged or holds more than tensors") as problem:
        read_pickle(tmp_path / "adapter_model.bin")
    assert "\n" not in str(problem.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.bin"]


@pytest.mark.parametrize("zipped", [True, False])
def test_flipped_bytes_are_read_or_refused(tmp_path: Path, zipped: bool) -> None:
    path, draw = tmp_path / "adapter_model.bin", random.Random(0)
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
    good = path.read_bytes()
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(draw.randint(1, 5)):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        path.write_bytes(bad)
        with warnings.catch_warnings(), contextlib.suppress(FormatError):
            warnings.simplefilter("ignore")
            read_pickle(tmp_path / "adapter_model.bin")
