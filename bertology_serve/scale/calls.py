"""What a call says of itself before anybody answers it: the delta that it asks, and how much work it is.

For whoever chooses a replica, the router and Envoy's picker, whatever the protocol of the call. Pure, and quick.
"""

from __future__ import annotations

import re
from collections import Counter as Tally

import msgspec

CHARACTERS, OWN_TOKENS = 4, 16  # bytes of a body for a token, about; tokens of a call without a text
SERVED_BY = b"x-served-by"
STATE = "/v2/repository/state"
CHANGE = re.compile(r"/v2/repository/models/([^/]+)/(load|unload|rollback)")
"""Paths of calls that change what is served, and go to every replica."""
_ON_PATH = re.compile(r"/(?:v2/models|models|tei|v1/models)/([^/:]+)")
NO_DELTA = frozenset({"stats"})  # words of paths where a delta's name could stand


class Named(msgspec.Struct):
    """What a body says of the deltas that it asks; the rest is skipped, not read."""

    delta: str | None = None
    deltas: tuple[str, ...] = ()
    model: str | None = None

    @property
    def name(self) -> str | None:
        """One of them, the same whatever their order."""
        return self.delta or (min(self.deltas) if self.deltas else self.model)


_named = msgspec.json.Decoder(list[Named] | Named)
PEEKED = 2**16  # bytes of a body beyond which only the first name in it is looked for
_FIRST = re.compile(rb'"(?:delta|model)"\s*:\s*"([^"\\]{1,128})"')


def delta_of(path: str, body: bytes) -> str | None:
    """The delta that a call asks, or asks most: by its path, else by its body. ``None``: any replica will do."""
    found = _ON_PATH.match(path)
    if found and found[1] not in NO_DELTA:
        return found[1]
    if len(body) > PEEKED:
        first = _FIRST.search(body, 0, PEEKED)
        return first[1].decode("utf-8", "replace") if first else None
    try:
        named = _named.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None  # the replica says what is wrong with it
    if isinstance(named, Named):
        return named.name
    tally = Tally(one.name for one in named if one.name)
    return min(tally, key=lambda name: (-tally[name], name), default=None)


def tokens_of(size: int) -> float:
    """About how many tokens a call with a body of so many bytes has."""
    return OWN_TOKENS + size / CHARACTERS
