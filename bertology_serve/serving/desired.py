"""The desired-state file: which version of each delta answers, what stands beside it, its weight and pins.

``{"deltas": {"mood": {"version": "2", "pin": true, "weight": 2, "canary": {"version": "3", "share": 0.1},
"shadow": "4"}}, "others": "keep"}``. Every field may be left out: without ``version`` the newest answers. ``others``
are the deltas that are not named: ``keep`` (the default) leaves them alone, ``unload`` takes them away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from bertology_serve.deltas.names import check_name
from bertology_serve.deltas.reading import read_regular
from bertology_serve.errors import FormatError, NotFound, SpecError
from bertology_serve.serving.splits import Split

LARGEST = 16 * 2**20


@dataclass(frozen=True)
class Canary:
    """A version and its share of the calls."""

    version: str
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise SpecError(f"share is {self.share}; expected a number from 0 to 1")


@dataclass(frozen=True)
class Wish:
    """What is wanted of one delta."""

    version: str | None = None
    pin: bool = False
    weight: float = 1.0
    canary: Canary | None = None
    shadow: str = ""

    def __post_init__(self) -> None:
        if not 1e-6 <= self.weight <= 1e6:
            raise SpecError(f"weight is {self.weight}; expected a number from 1e-6 to 1e6")

    @property
    def split(self) -> Split:
        """What stands beside the version that answers."""
        canary = self.canary or Canary("", 0.0)
        return Split(canary.version, canary.share, self.shadow)


@dataclass(frozen=True)
class Desired:
    """The whole file."""

    deltas: dict[str, Wish] = field(default_factory=dict)
    others: Literal["keep", "unload"] = "keep"


def read_desired(path: Path) -> Desired:
    """The file's content. Raises NotFound, FormatError for what is no such file, SpecError naming the field."""
    if not path.exists():
        raise NotFound(f"cannot read {path}: there is no such file; expected the desired state as JSON")
    content = read_regular(path, LARGEST, str(path))
    try:
        found = msgspec.json.decode(content, type=Desired, strict=True)
        for name, wish in found.deltas.items():
            for word, what in ((name, "delta name"), (wish.version or "1", "version")):
                check_name(word, what)
    except (msgspec.DecodeError, UnicodeDecodeError, FormatError, RecursionError) as problem:
        raise SpecError(f"{path}: {problem}") from None
    return found
