"""The garbage collector of a process that has loaded everything."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress


def settle_memory() -> None:
    """Keeps the garbage collector from what is there now, for a process that only serves, or forks, from here on.

    Torch and its models are hundreds of thousands of objects; looking at all of them stops every call meanwhile, and
    copies what forked processes share. What loading has left behind goes back to the system, where the C library can
    do that.
    """
    gc.collect()
    gc.freeze()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
