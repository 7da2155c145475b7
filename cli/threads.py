"""How torch's threads wait for each other."""

from __future__ import annotations

import os
import sys

POLICY, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
SHORT = "10000"


def share_cores() -> bool:
    """Lets torch's threads spin some microseconds for each other and then sleep; for before torch is imported.

    A packed batch is hundreds of short products: threads that sleep at once pay a wake-up for each (batches a fifth
    slower), while libgomp's default spins for milliseconds and keeps the cores from a server's event loop, tokenizers
    and other processes (batches up to 17 times slower where two other processes were busy). Two threads on two cores
    of an AMD EPYC, torch 2.13. What the environment says already is left alone; false where that, or torch, was
    first.
    """
    if "torch" in sys.modules or {SPINS, POLICY} & os.environ.keys():
        return False
    os.environ[SPINS] = SHORT
    return True
