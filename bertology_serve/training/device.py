"""Where a run computes."""

from __future__ import annotations

import torch

from bertology_serve.errors import SpecError


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether ``precision`` means bf16 there: ``auto`` does on GPUs that have it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def find_device(name: str) -> str:
    """``auto`` (a CUDA GPU where torch sees one, else the CPU), or a device as torch names it, checked."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SpecError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:INDEX") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SpecError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA GPUs; take cpu")
    return name
