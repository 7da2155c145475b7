"""Every error that this package raises on purpose.

BertologyError
├── InputError          what the caller gave cannot be used (CLI: exit code 2; HTTP: 400)
│   ├── SpecError       an option or field has a value that makes no sense
│   ├── DataError       a record or data file is malformed (names file, row and field)
│   ├── LimitError      something is larger than its limit (HTTP: 413)
│   ├── SlowBody        a call's body came too slowly (HTTP: 408)
│   ├── FormatError     a delta directory is malformed, truncated or unsafe
│   └── BaseMismatch    a delta was made for other base weights
├── NotFound            no delta, version or file of that name (HTTP: 404)
├── Unsupported         a combination that this encoder or exporter does not do (CLI: 2; HTTP: 400)
├── Unauthorized        no API key, or an unknown one (HTTP: 401)
├── Forbidden           the API key does not open this (HTTP: 403)
├── Overloaded          the queue is full or draining; try again later (HTTP: 503 with Retry-After)
│   ├── RateLimited     the caller has sent too much for its share (HTTP: 429 with Retry-After)
│   └── Crashed         the executor's process ended over this, twice (HTTP: 503 with Retry-After)
├── Expired             the answer would have come after its deadline; nothing was computed (HTTP: 504)
└── VerificationError   a result was checked against its reference and differs; nothing was published (CLI: 1)

A message says what was given, what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar


class BertologyError(Exception):
    """Base of all errors raised on purpose by bertology_serve."""


class InputError(BertologyError):
    """What the caller gave cannot be used."""


class SpecError(InputError):
    """An option or field of a spec has a value that makes no sense."""


class DataError(InputError):
    """A record or a data file is malformed."""


class LimitError(InputError):
    """Something is larger than its limit."""


class SlowBody(InputError):
    """A call's body did not come in time."""


class FormatError(InputError):
    """A delta directory is malformed, truncated or unsafe."""


class BaseMismatch(InputError):
    """A delta was made for other base weights."""


class NotFound(BertologyError):
    """No delta, version or file of that name."""


class Unsupported(BertologyError):
    """A combination that this encoder or exporter does not do."""


class Overloaded(BertologyError):
    """The queue is full or draining; ``retry_after`` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(Overloaded):
    """The caller has sent too much for its share; the server has room for others."""


class Crashed(Overloaded):
    """The executor's process ended while it worked on this."""


class Unauthorized(BertologyError):
    """No API key was sent, or one that is not known."""


class Forbidden(BertologyError):
    """The API key is known, but does not open this."""


class Expired(BertologyError):
    """The deadline came before the answer; what was still queued was not computed."""


class VerificationError(BertologyError):
    """A result differs from its reference."""


def printable(text: str) -> str:
    """Text that every log can hold: what names of files may have and UTF-8 has not is written out (``\\udcff``)."""
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(error: BaseException) -> str:
    """What another library's error says, on one line and not long; its type where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


E = TypeVar("E", bound=BertologyError)
MOST_NAMED = 50


def about(problem: E, what: str) -> E:
    """The same error; where its message does not name what it is about, it now begins with that."""
    if what not in str(problem):
        problem.args = (f"{what}: {problem}", *problem.args[1:])
    return problem


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown word: the nearest known one, and all of them if they are few."""
    known = sorted(known)
    close = difflib.get_close_matches(word[:80], known[:1000], n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known) if len(known) <= MOST_NAMED else f'{len(known)} others'}"
