"""Where API keys come from: a JSON file, and two environment variables.

The file holds ``{"keys": [{"name", "key" or "sha256", "admin"?, "deltas"?, ...}]}``, every field of ``Key``.
``BERTOLOGY_API_KEYS`` and ``BERTOLOGY_ADMIN_KEYS`` hold plain keys with commas between, without limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from bertology_serve.errors import NotFound, SpecError, nearest
from bertology_serve.serving.keys import Key, Keyring, digest_of

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
    """One entry of the file, as ``Key`` checks it."""
    if not isinstance(entry, dict):
        raise SpecError(f"{where}: expected an object with 'name' and 'key' or 'sha256'")
    for field in entry:
        if field not in _FIELDS:
            raise SpecError(f"{where}: unknown field {field[:40]!r}; {nearest(field, _FIELDS)}")
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
