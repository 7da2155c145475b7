"""The memory of a process that has loaded everything."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_MAPS = Path("/proc/self/smaps")
_FILE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ...p \S+ \S+ \S+ +/(?!dev/)")  # mapped by this process for itself
_DONTNEED = 4  # of madvise(2)


def settle_memory() -> None:
    """Keeps the garbage collector from what is there now, for a process that only serves, or forks, from here on.

    Torch and its models are hundreds of thousands of objects; looking at all of them stops every call meanwhile, and
    copies what forked processes share. What loading has left behind goes back to the system, where the C library can
    do that; so do the pages of files that are as the files are, weights that were packed or checked and code that only
    a start needs: who reads them again has them back from the page cache.
    """
    gc.collect()
    gc.freeze()
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        for start, end in _unchanged():
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


def _unchanged() -> Iterator[tuple[int, int]]:
    """First and last address of every mapped file of which nothing was changed in memory. Linux."""
    mapped: re.Match[str] | None = None
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        if line[0] in "0123456789abcdef":
            mapped = _FILE.match(line)
        elif mapped and line.startswith("Anonymous:") and line.split()[1] == "0":
            yield int(mapped[1], 16), int(mapped[2], 16)
