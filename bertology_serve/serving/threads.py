"""How torch's threads wait for each other."""

from __future__ import annotations

import os
import sys

SPINS = "1000"


def share_cores() -> bool:
    """Lets torch's threads sleep soon instead of spinning while they wait; for before torch is imported.

    A server's event loop, tokenizers and clients want the same cores. libgomp spins 300,000 rounds by default: with
    two threads on two busy cores a batch of 1,518 MiniLM tokens then took 0.8 to 1.2 s, and 0.3 to 0.5 s with 1,000.
    ``GOMP_SPINCOUNT`` and ``OMP_WAIT_POLICY`` of the environment are left alone; false where they, or torch, were first.
    """
    if "torch" in sys.modules or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return False
    os.environ["GOMP_SPINCOUNT"] = SPINS
    return True
