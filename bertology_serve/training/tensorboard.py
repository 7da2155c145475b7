"""TensorBoard's event files, written without TensorBoard: records of length, checksums and a small protocol buffer.

A record is ``uint64 length, uint32 masked CRC-32C of it, bytes, uint32 masked CRC-32C of them``; the bytes are an
``Event``: wall_time (1, double), step (2, varint), file_version (3, text) or summary (5), whose values (1) hold tag (1,
text) and simple_value (2, float).
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from bertology_serve.training.methods import ParameterCount
from bertology_serve.training.trainer import Line

VERSION = "brain.Event:2"
SHOWN = ("loss", "lr", "grad_norm", "tokens_per_s")


class TensorBoard:
    """A watcher that writes scalars into ``folder`` as they come, one file a run or continuation.

    The tags of a recipe's stages begin with the stage.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{int(time.time())}.{os.getpid()}"
        self.stage = ""
        self._write(event(0, version=VERSION))

    def staged(self, stage: int, count: int, title: str) -> None:
        """Its tags begin with ``stage N/`` from here on."""
        self.stage = f"stage {stage}/"

    def began(self, step: int, total: int, parameters: ParameterCount) -> None:
        """There is nothing to draw yet."""

    def stepped(self, line: Line) -> None:
        """Loss, learning rate, gradient and speed; each layer's gradient where it was measured."""
        values = {f"train/{name}": line[name] for name in SHOWN if name in line}
        values |= {f"gradient/{place}": value for place, value in line.get("layer_norms", {}).items()}
        self._scalars(line["step"], values)

    def evaluated(self, line: Line) -> None:
        self._scalars(line["step"], {f"eval/{name}": value for name, value in line["eval"].items()})

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._write(event(step, {f"{self.stage}{tag}": value for tag, value in values.items()}))

    def _write(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(record(data))


def event(step: int, scalars: Mapping[str, float] | None = None, version: str = "") -> bytes:
    """One ``Event``, now."""
    data = b"\x09" + struct.pack("<d", time.time()) + b"\x10" + varint(step)
    if version:
        data += b"\x1a" + _sized(version.encode())
    if scalars:
        values = (b"\x0a" + _sized(tag.encode()) + b"\x15" + struct.pack("<f", value) for tag, value in scalars.items())
        data += b"\x2a" + _sized(b"".join(b"\x0a" + _sized(value) for value in values))
    return data


def record(data: bytes) -> bytes:
    """The bytes with their length and checksums around them."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))


def masked(data: bytes) -> int:
    """CRC-32C, turned and moved as TFRecord files have it."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum (RFC 3720, B.4)."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF


def varint(number: int) -> bytes:
    """A number from 0 as protocol buffers write it."""
    data = b""
    while number > 0x7F:
        data += bytes([number & 0x7F | 0x80])
        number >>= 7
    return data + bytes([number])


def _sized(data: bytes) -> bytes:
    return varint(len(data)) + data


def _entry(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_TABLE = tuple(_entry(byte) for byte in range(256))
