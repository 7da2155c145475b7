"""What must be on the disk before anybody sees it."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Waits until the disk holds a file, or a directory's entries. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
