"""What executors are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What the nursery loads. ``dtype`` is torch's name of it."""

    backbone: str
    dtype: str = "float32"
    log_level: str = "warning"
    log_format: str = "text"


@dataclass(frozen=True)
class Place:
    """Where an executor runs: the device's name, and how many threads a batch takes."""

    device: str
    threads: int
