"""The most memory that a piece of work held."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Measures from its making to ``bytes()``: the GPU's allocations, or the resident memory of the whole process.

    ``bytes()`` is ``None`` where the system does not tell (Linux does).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known = device.type == "cuda" or self._reset()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        """The peak so far."""
        if not self.known:
            return None
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        found = [line.split()[1] for line in lines if line.startswith("VmHWM")]
        return int(found[0]) * 1024 if found else None

    @staticmethod
    def _reset() -> bool:
        """Lets the kernel forget the process's earlier peak."""
        try:
            _RESET.write_text("5", encoding="utf-8")
        except OSError:
            return False
        return True
