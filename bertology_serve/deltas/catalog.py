"""Finds deltas under a directory, and says what each is called.

``NAME/VERSION/`` is version VERSION of delta NAME. A delta directory anywhere else is *bare*: its name stands in
``delta.json`` (for a directory of peft's: the directory's own name) and its version is the first 12 hex digits of the
SHA-256 of ``delta.json`` (peft: of ``adapter_config.json`` followed by ``adapter_model.safetensors``).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bertology_serve.deltas.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST, check_name
from bertology_serve.deltas.reading import Limits, read_bytes, read_json
from bertology_serve.errors import FormatError, NotFound, nearest

VERSION_DIGITS = 12


class Identity(NamedTuple):
    """What a delta directory is called; ``bare`` where the version is its content's hash."""

    name: str
    version: str
    bare: bool


def is_delta(directory: Path) -> bool:
    """Whether a directory holds a delta, ours or peft's."""
    return (directory / MANIFEST).is_file() or (directory / ADAPTER_CONFIG).is_file()


def identify(
    directory: Path, limits: Limits | None = None, root: Path | None = None, name: str | None = None
) -> Identity:
    """Name and version of a delta directory; ``name`` is what a directory of peft's shall be called."""
    limits, root, place = limits or Limits(), root or directory, Path(os.path.abspath(directory))
    own = (directory / MANIFEST).exists()
    if own:
        values, data = read_json(directory / MANIFEST, limits, root)
        found = check_name(values.get("name"), f"{directory / MANIFEST}: name")
        if name not in (None, found):
            raise FormatError(f"{directory} holds delta {found!r}, not {name!r}; rename the directory or the delta")
    else:
        found = check_name(name or place.name, "delta name")
    if place.parent.name == found and (own or name):
        return Identity(found, check_name(place.name, "version"), bare=False)
    if not own:
        data = read_bytes(directory / ADAPTER_CONFIG, limits.json_bytes, root)
        data += read_bytes(directory / ADAPTER_WEIGHTS, limits.file_bytes, root)
    return Identity(found, hashlib.sha256(data).hexdigest()[:VERSION_DIGITS], bare=True)


def discover(root: Path, limits: Limits | None = None) -> dict[str, list[Path]]:
    """The deltas under ``root`` by name, each with its versions' directories, the newest last.

    ``root`` may be a delta directory itself. Hidden entries (``.name``) are passed over, so that what is being written
    is not seen. Versions are ordered as people number them (2 before 10); bare directories come before them, by the
    time that their ``delta.json`` was written. Raises NotFound without ``root``, FormatError for what is malformed or
    points outside.
    """
    if not root.is_dir():
        raise NotFound(f"no directory {root}; expected one with deltas in it (NAME/VERSION/ or bare)")
    try:
        return _discover(root, limits or Limits())
    except OSError as error:
        raise FormatError(f"cannot read {error.filename}: {error.strerror}; check its permissions") from None


def find(root: Path, name: str, version: str | None = None) -> Path:
    """The directory of a delta's version (``None``: the newest); raises NotFound naming the nearest known."""
    deltas = discover(root)
    if name not in deltas:
        raise NotFound(f"no delta {name[:80]!r} in {root}; {nearest(name[:80], deltas)}")
    if version is None:
        return deltas[name][-1]
    versions = {identify(path, name=name).version: path for path in deltas[name]}
    if version not in versions:
        raise NotFound(f"delta {name!r} has no version {version[:80]!r}; {nearest(version[:80], versions)}")
    return versions[version]


def versions(root: Path, name: str, limits: Limits | None = None) -> dict[str, Path]:
    """The directories of one delta's versions under ``root``, the newest last; other deltas' faults do not matter.

    Raises NotFound where there is none, FormatError for a name that cannot be one and for what points outside.
    """
    limits, holder = limits or Limits(), root / check_name(name, "delta name")
    try:
        found = [(identify(path, limits, root, name), path) for path in _held(holder, root)]
        found += [(identity, path) for identity, path in _bare(root, name, limits) if identity.name == name]
        ordered = sorted((_age(path, identity), identity.version, path) for identity, path in found)
    except OSError as error:
        raise FormatError(f"cannot read {error.filename}: {error.strerror}; check its permissions") from None
    if not ordered:
        raise NotFound(f"no delta {name!r} in {root}; expected {name}/VERSION/{MANIFEST} there")
    return {version: path for _, version, path in ordered}


def _held(holder: Path, root: Path) -> list[Path]:
    """The delta directories in ``NAME/``."""
    if not holder.is_dir() or is_delta(holder):
        return []
    if not holder.resolve().is_relative_to(root.resolve()):
        raise FormatError(f"{holder} points outside {root}, to {holder.resolve()}; copy the directory there (cp -rL)")
    return [path for path in _children(holder, root) if is_delta(path)]


def _bare(root: Path, name: str, limits: Limits) -> Iterator[tuple[Identity, Path]]:
    """Bare directories that may hold a delta of that name; those that cannot be read are passed over."""
    children = [path for path in root.iterdir() if not path.name.startswith(".")] if root.is_dir() else []
    for path in [root] if is_delta(root) else children:
        if not is_delta(path) or (not (path / MANIFEST).exists() and path.name != name):
            continue
        try:
            yield identify(path, limits, root), path
        except FormatError:
            continue


def _discover(root: Path, limits: Limits) -> dict[str, list[Path]]:
    found: dict[str, dict[str, tuple[tuple[object, ...], Path]]] = {}
    for path, name in _directories(root):
        identity = identify(path, limits, root, name)
        versions = found.setdefault(identity.name, {})
        versions[identity.version] = (_age(path, identity), path)
    return {name: [path for _, path in sorted(versions.values())] for name, versions in sorted(found.items())}


def _directories(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Delta directories, with the name of the directory that holds them where that is below ``root``."""
    if is_delta(root):
        yield root, None
        return
    for child in _children(root, root):
        if is_delta(child):
            yield child, None
        else:
            yield from ((path, child.name) for path in _children(child, root) if is_delta(path))


def _children(directory: Path, root: Path) -> list[Path]:
    paths = sorted(path for path in directory.iterdir() if not path.name.startswith(".") and path.is_dir())
    for path in paths:
        if not path.resolve().is_relative_to(root.resolve()):
            raise FormatError(f"{path} points outside {root}, to {path.resolve()}; copy the directory there (cp -rL)")
    return paths


def _age(path: Path, identity: Identity) -> tuple[object, ...]:
    if identity.bare:
        marker = path / MANIFEST if (path / MANIFEST).exists() else path / ADAPTER_CONFIG
        return 0, marker.stat().st_mtime_ns, identity.version
    parts = re.split(r"(\d+)", identity.version)
    return 1, *((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part)
