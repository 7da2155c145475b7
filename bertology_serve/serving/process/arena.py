"""Memory that two processes share: without a name, so that nothing is left of it when both have ended, however."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bertology_serve.serving.process.frames import Lost

PAGE = 1 << 20  # what it grows by, in bytes


class Arena:
    """One writer, one reader, who are told of each other's doings by frames. Grows as it needs to.

    ``fd`` is its file descriptor, which the other process gets.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("bertology-serve") if fd is None else fd
        self._map: mmap.mmap | None = None
        weakref.finalize(self, os.close, self.fd)  # not before: another thread's number may soon be another file's

    def write(self, arrays: Sequence[NDArray[np.generic]]) -> None:
        """Lays arrays one after the other from the beginning."""
        size = sum(array.nbytes for array in arrays)
        if not size:
            return
        if size > os.fstat(self.fd).st_size:
            os.ftruncate(self.fd, -(-size // PAGE) * PAGE)
        memory, at = self._mapped(size), 0
        for array in arrays:
            memory[at : at + array.nbytes] = array.tobytes()
            at += array.nbytes

    def read(self, count: int, dtype: DTypeLike) -> NDArray[np.generic]:
        """A copy of that many numbers from the beginning; Lost where they cannot be there."""
        size = count * np.dtype(dtype).itemsize
        if not 0 <= size <= os.fstat(self.fd).st_size:
            raise Lost(f"{size} bytes are said to be in {os.fstat(self.fd).st_size}")
        if not size:
            return np.zeros(0, dtype)
        return np.frombuffer(self._mapped(size)[:size], dtype=dtype)

    def _mapped(self, size: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size:
            if self._map is not None:
                self._map.close()
            self._map = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
        return self._map
