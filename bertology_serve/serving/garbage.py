"""The garbage collector of a process that has loaded everything."""

from __future__ import annotations

import gc


def settle_memory() -> None:
    """Keeps the garbage collector from what is there now, for a process that only serves, or forks, from here on.

    Torch and its models are hundreds of thousands of objects; looking at all of them stops every call meanwhile, and
    copies what forked processes share.
    """
    gc.collect()
    gc.freeze()
