"""On what terms a call is answered."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Terms:
    """``gone()`` returns when the caller has left: what is still queued is then dropped.

    ``charge(tokens)`` hears what the call costs before it is queued, and may raise. The answer is worth nothing after
    ``seconds``. Of one delta's work the lowest ``priority`` goes first (0: the default one).
    """

    gone: Callable[[], Awaitable[None]] | None = None
    charge: Callable[[int], None] | None = None
    seconds: float = math.inf
    priority: int = 0
