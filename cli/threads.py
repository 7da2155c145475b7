"""How torch's threads wait for each other."""

from __future__ import annotations

import os
import sys

POLICY = "OMP_WAIT_POLICY"


def share_cores() -> bool:
    """Lets torch's threads sleep while they wait for each other, instead of spinning; for before torch is imported.

    Other processes, a server's event loop, tokenizers and clients want the same cores. With two threads on two busy
    cores (AMD EPYC, torch 2.13) a batch of 1,518 MiniLM tokens took 4.2 s with libgomp's default spinning and 0.25 s
    with sleeping threads; one thread took 0.22 s. What the environment says already is left alone; false where that,
    or torch, was first.
    """
    if "torch" in sys.modules or {"GOMP_SPINCOUNT", POLICY} & os.environ.keys():
        return False
    os.environ[POLICY] = "PASSIVE"
    return True
