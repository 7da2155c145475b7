"""API keys: who may ask which deltas for how much, and where keys come from. They are kept as digests, never logged."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from bertology_serve.errors import Forbidden, NotFound, RateLimited, SpecError, Unauthorized, nearest

SHORTEST = 16
_DIGEST = re.compile(r"[0-9a-f]{64}")


def digest_of(key: str, name: str) -> str:
    """The SHA-256 of a key in hex; SpecError for a key that is too short or cannot stand in a header."""
    if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
        raise SpecError(
            f"key {name!r}: expected at least {SHORTEST} ASCII characters without spaces; "
            "try: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True)
class Key:
    """What is known about one API key. SpecError for values that make no sense.

    ``name`` is what logs call it, ``sha256`` the key's digest in hex (``digest_of``). ``deltas`` are names or patterns
    (``team-*``) of the deltas that it opens, ``None`` for all. ``admin`` opens the management routes. Rates are
    averages, ``None`` is no limit; ``burst_seconds`` worth of them may come at once.
    """

    name: str
    sha256: str = field(repr=False)
    admin: bool = False
    deltas: tuple[str, ...] | None = None
    calls_per_second: float | None = None
    tokens_per_second: float | None = None
    burst_seconds: float = 1.0

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 64 or not self.name.isprintable():
            raise SpecError(f"a key's name is {self.name[:64]!r}; expected 1 to 64 printable characters")
        if not _DIGEST.fullmatch(self.sha256):
            raise SpecError(f"key {self.name!r}: sha256 is no digest; expected 64 of 0-9 a-f")
        for what in ("calls_per_second", "tokens_per_second", "burst_seconds"):
            value = getattr(self, what)
            if value is not None and not 0 < value < float("inf"):
                raise SpecError(f"key {self.name!r}: {what} is {value}; expected a number above 0")


class Access:
    """What one caller may do. ``check`` and ``charge`` raise; ``allows`` says; some deltas are closed to ``restricted``
    ones.
    """

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.admin, self._patterns, self._clock = key.name, key.admin, key.deltas, clock
        self.restricted = key.deltas is not None
        self._calls = _bucket(key.calls_per_second, key.burst_seconds)
        self._tokens = _bucket(key.tokens_per_second, key.burst_seconds)
        self.metered = self._tokens is not None

    def allows(self, delta: str) -> bool:
        return self._patterns is None or any(fnmatchcase(delta, pattern) for pattern in self._patterns)

    def check(self, delta: str) -> None:
        """Raises Forbidden for a delta that it does not open, in the same words whether there is one or not."""
        if not self.allows(delta):
            raise Forbidden(f"this API key does not open delta {delta[:80]!r}; ask for a key that does")

    def check_admin(self) -> None:
        """Raises Forbidden where it does not open the management routes."""
        if not self.admin:
            raise Forbidden("this route needs an API key with admin rights; start the server with one (--keys-file)")

    def call(self) -> None:
        """Counts one call; RateLimited where there were too many."""
        _take(self._calls, 1, "calls", self._clock)

    def charge(self, tokens: int) -> None:
        """Counts tokens about to be queued; RateLimited where there were too many. Needed where it is ``metered``."""
        _take(self._tokens, tokens, "tokens", self._clock)


def _bucket(rate: float | None, seconds: float) -> Bucket | None:
    return None if rate is None else Bucket(rate, rate * seconds)


def _take(bucket: Bucket | None, amount: int, what: str, clock: Callable[[], float]) -> None:
    if bucket is None:
        return
    wait = bucket.take(amount, clock())
    if wait:
        raise RateLimited(f"this API key may send {bucket.rate:g} {what} a second; try again in {wait:.1f} s", wait)


EVERYONE = Access(Key("everyone", "0" * 64))


class Keyring:
    """The keys of one server. Finding one takes the same time whatever was presented.

    Keys are kept as keyed digests under a secret of this process: what a look-up compares tells nothing about a key.
    """

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._secret = secrets.token_bytes(32)
        self._access: dict[bytes, tuple[bytes, Access]] = {}
        names: set[str] = set()
        for key in keys:
            digest = self._mark(bytes.fromhex(key.sha256))
            if digest in self._access or key.name in names:
                raise SpecError(f"key {key.name!r} is there twice; expected every key and name once")
            names.add(key.name)
            self._access[digest] = (digest, Access(key))

    def __len__(self) -> int:
        return len(self._access)

    def find(self, headers: Iterable[tuple[bytes, bytes]]) -> Access:
        """Who calls, by ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``; Unauthorized without a known key.

        Without any keys everyone may ask any delta, and nobody manages.
        """
        if not self._access:
            return EVERYONE
        for presented in _presented(headers):
            digest = self._mark(hashlib.sha256(presented).digest())
            known, access = self._access.get(digest, (b"", EVERYONE))
            if hmac.compare_digest(known, digest):
                return access
        raise Unauthorized("no valid API key; send one as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")

    def _mark(self, digest: bytes) -> bytes:
        """BLAKE2's own keyed mode: HMAC by OpenSSL lets go of the interpreter, which costs a busy server 40 µs."""
        return hashlib.blake2b(digest, key=self._secret, digest_size=32).digest()


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            yield value[7:].strip()
        elif name == b"x-api-key":
            yield value.strip()


API_KEYS, ADMIN_KEYS = "BERTOLOGY_API_KEYS", "BERTOLOGY_ADMIN_KEYS"
LARGEST = 4 * 2**20
_FIELDS = ("key", *(field.name for field in fields(Key)))


def read_keyring(path: Path | None, environ: Mapping[str, str]) -> Keyring:
    """The keys of the file and of the environment together. Raises NotFound and SpecError; no message holds a key."""
    keys = list(_from_file(path)) if path is not None else []
    for variable, admin in ((API_KEYS, False), (ADMIN_KEYS, True)):
        plain = [part.strip() for part in environ.get(variable, "").split(",") if part.strip()]
        for number, key in enumerate(plain, 1):
            name = f"{variable}:{number}"
            keys.append(Key(name, digest_of(key, name), admin=admin))
    if path is not None and not keys:
        raise SpecError(f"{path} holds no keys; expected at least one, or no --keys-file")
    return Keyring(keys)


def _from_file(path: Path) -> Iterator[Key]:
    try:
        if path.stat().st_size > LARGEST:
            raise SpecError(f"{path} is larger than {LARGEST} bytes; expected a file of API keys")
        content = msgspec.json.decode(path.read_bytes())
    except OSError as problem:
        raise NotFound(f"cannot read {path}: {problem.strerror}; expected a JSON file of API keys") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise SpecError(f'{path} is not JSON; expected {{"keys": [{{"name": ..., "key": ...}}]}}') from None
    keys = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(keys, list):
        raise SpecError(f'{path} has no list "keys"; expected {{"keys": [{{"name": ..., "key": ...}}]}}')
    for number, entry in enumerate(keys):
        yield _key(entry, f"{path}: key {number}")


def _key(entry: Any, where: str) -> Key:
    if not isinstance(entry, dict):
        raise SpecError(f"{where}: expected an object with 'name' and 'key' or 'sha256'")
    for key in entry:
        if key not in _FIELDS:
            raise SpecError(f"{where}: unknown field {key[:40]!r}; {nearest(key, _FIELDS)}")
    values = dict(entry)
    plain = values.pop("key", None)
    if (plain is None) == ("sha256" not in values):
        raise SpecError(f"{where}: expected either 'key' or 'sha256'")
    if plain is not None:
        values["sha256"] = digest_of(plain if isinstance(plain, str) else "", where)
    try:
        return msgspec.convert(values, Key)
    except (msgspec.ValidationError, TypeError) as problem:
        raise SpecError(f"{where}: {problem}") from None  # names fields and types, never values


class Bucket:
    """Refilled at ``rate`` units a second up to ``burst``. Belongs to one thread; the caller brings the time.

    What is larger than the whole bucket passes when the bucket is full and leaves it in debt, so that every size is
    served and the average holds.
    """

    def __init__(self, rate: float, burst: float | None = None) -> None:
        self.rate, self.burst = rate, rate if burst is None else burst
        self._level, self._seen = self.burst, -math.inf

    def take(self, amount: float, now: float) -> float:
        """0 where ``amount`` was taken; else the seconds until it could be, and nothing is taken."""
        self._level = min(self.burst, self._level + self.rate * (now - self._seen))
        self._seen = now
        missing = min(amount, self.burst) - self._level
        if missing > 1e-9:
            return missing / self.rate
        self._level -= amount
        return 0.0
