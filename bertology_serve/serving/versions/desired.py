"""What is wanted of each delta, as a file or a call says it.

``{"deltas": {"mood": {"version": "2", "pin": true, "weight": 2, "canary": {"version": "3", "share": 0.1},
"shadow": "4"}}, "others": "keep"}``. Every field may be left out: without ``version`` the newest answers, and
``"loaded": false`` takes the delta away. ``others`` are the deltas that are not named: ``keep`` (the default) leaves
them alone, ``unload`` takes them away."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import msgspec

from bertology_serve.deltas.catalog import check_name
from bertology_serve.deltas.safe_io import read_regular
from bertology_serve.errors import FormatError, NotFound, SpecError

LARGEST = 16 * 2**20


@dataclass(frozen=True)
class Split:
    """``canary`` is the version that answers ``share`` of the calls; ``shadow`` one that is asked too, in vain."""

    canary: str = ""
    share: float = 0.0
    shadow: str = ""

    @property
    def versions(self) -> set[str]:
        """The versions that stand beside the one that answers."""
        return {version for version in (self.canary, self.shadow) if version}


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
    """What is wanted of one delta; nothing else counts where it is not ``loaded``."""

    version: str | None = None
    loaded: bool = True
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

    def only(self, names: Collection[str]) -> Desired:
        """What it says of these deltas, and nothing of others."""
        unnamed = dict.fromkeys(names, Wish(loaded=False)) if self.others == "unload" else {}
        return Desired({name: wish for name, wish in (unnamed | self.deltas).items() if name in names})


def read_desired(path: Path) -> Desired:
    """The file's content. Raises NotFound, FormatError for what is no such file, SpecError naming the field."""
    if not path.exists():
        raise NotFound(f"cannot read {path}: there is no such file; expected the desired state as JSON")
    return parse_desired(read_regular(path, LARGEST, str(path)), str(path))


def parse_desired(content: bytes, where: str) -> Desired:
    """The desired state that JSON says. SpecError names ``where`` and the field."""
    try:
        found = msgspec.json.decode(content, type=Desired, strict=True)
        for name, wish in found.deltas.items():
            for word, what in ((name, "delta name"), (wish.version or "1", "version")):
                check_name(word, what)
    except (msgspec.DecodeError, UnicodeDecodeError, FormatError, RecursionError) as problem:
        raise SpecError(f"{where}: {problem}") from None
    return found


def write_desired(desired: Desired) -> bytes:
    """The inverse of ``parse_desired``; fields at their defaults are left out."""
    return msgspec.json.encode(
        {"deltas": {name: _brief(wish) for name, wish in desired.deltas.items()}, "others": desired.others}
    )


def _brief(wish: Wish) -> dict[str, object]:
    return {one.name: getattr(wish, one.name) for one in fields(wish) if getattr(wish, one.name) != one.default}
