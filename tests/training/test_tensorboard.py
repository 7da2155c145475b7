from __future__ import annotations

import struct
from pathlib import Path

import pytest

from bertology_serve.training.tensorboard import VERSION, TensorBoard, crc32c, masked, varint


def records(path: Path) -> list[bytes]:
    """The records of a file, their checksums checked."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == masked(data[:8])
        found.append(data[12 : 12 + length])
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked(found[-1])
        data = data[16 + length :]
    return found


def fields(data: bytes) -> list[tuple[int, object]]:
    """(number, value) of a protocol buffer's fields: varints, doubles, floats and bytes."""
    found: list[tuple[int, object]] = []
    while data:
        key, data = data[0], data[1:]
        if key & 7 == 0:
            number, data = _varint(data)
            found.append((key >> 3, number))
        elif key & 7 == 2:
            size, data = _varint(data)
            found.append((key >> 3, data[:size]))
            data = data[size:]
        else:
            size, form = (8, "<d") if key & 7 == 1 else (4, "<f")
            found.append((key >> 3, struct.unpack(form, data[:size])[0]))
            data = data[size:]
    return found


def _varint(data: bytes) -> tuple[int, bytes]:
    number = shift = 0
    while data[0] & 0x80:
        number |= (data[0] & 0x7F) << shift
        shift, data = shift + 7, data[1:]
    return number | data[0] << shift, data[1:]


@pytest.mark.parametrize(("data", "expected"), [(b"", 0), (b"123456789", 0xE3069283), (b"\0" * 32, 0x8A9136AA)])
def test_checksum_is_castagnoli_s(data: bytes, expected: int):
    assert crc32c(data) == expected, "RFC 3720, B.4"


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**40])
def test_numbers_come_back(number: int):
    assert _varint(varint(number)) == (number, b"")


def test_lines_become_scalars(tmp_path: Path):
    board = TensorBoard(tmp_path / "x")
    board.staged(2, 2, "full")
    board.stepped(
        {"step": 300, "loss": 0.5, "lr": 1e-3, "grad_norm": 2.0, "tokens_per_s": 9.0, "layer_norms": {"0": 4.0}}
    )
    board.evaluated({"step": 301, "eval": {"accuracy": 0.75}})
    first, step, measured = (dict(fields(data)) for data in records(board.path))
    assert first[3] == VERSION.encode()
    assert (step[2], measured[2]) == (300, 301)

    def scalars(event: dict[int, object]) -> dict[object, object]:
        return {dict(fields(value))[1]: dict(fields(value))[2] for _, value in fields(event[5])}  # type: ignore[arg-type]

    assert scalars(measured) == {b"stage 2/eval/accuracy": 0.75}
    expected = {b"loss": 0.5, b"grad_norm": 2.0, b"tokens_per_s": 9.0}
    assert {b"stage 2/train/" + name: value for name, value in expected.items()}.items() <= scalars(step).items()
    assert scalars(step)[b"stage 2/gradient/0"] == 4.0
