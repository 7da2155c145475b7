"""Finds deltas under a directory, and says what each is called; the names of a delta's files.

``NAME/VERSION/`` is version VERSION of delta NAME. A delta directory anywhere else is *bare*: its name stands in
``delta.json`` (for a directory of peft's: the directory's own name) and its version is the first 12 hex digits of the
SHA-256 of ``delta.json`` (peft: of ``adapter_config.json`` followed by ``adapter_model.safetensors``).

``identify`` is that rule. ``survey`` applies it to everything below a directory, and everybody who asks what there is
asks ``survey``: start, watching, the repository's index, loads, ``predict``, ``inspect``. A delta directory holds no
other deltas: what lies below one is not seen, and ``check_place`` keeps writers from putting it there.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bertology_serve.deltas.safe_io import Limits, read_bytes, read_json, untrusted
from bertology_serve.errors import BertologyError, FormatError, InputError, NotFound, nearest

MANIFEST = "delta.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FULL_WEIGHTS = "model.safetensors"
CARD = "README.md"
PICKLES = ("adapter_model.bin", "pytorch_model.bin", "pytorch_adapter.bin")
FILES = (ADAPTER_WEIGHTS, FULL_WEIGHTS, CARD, MANIFEST, ADAPTER_CONFIG)

OWN_PREFIX = "bertology."  # what tensors begin with that peft has no name for
RESERVED = ("base",)  # the encoder itself answers under this name
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_name(word: object, what: str) -> str:
    """``word`` if it can be the name of a delta or version; raises FormatError."""
    if not isinstance(word, str) or not _NAME.fullmatch(word):
        raise FormatError(
            f"{what} {str(word)[:80]!r} cannot be used; expected 1 to 64 of a-z 0-9 . _ -, beginning with a-z or 0-9"
        )
    if word in RESERVED:
        raise FormatError(f"{what} {word!r} is taken by the encoder itself; choose another name")
    return word


VERSION_DIGITS = 12


class DeltaVersion(NamedTuple):
    """One version of a delta and its directory; ``bare`` where the version is its content's hash."""

    name: str
    version: str
    path: Path
    bare: bool


@dataclass(frozen=True)
class InvalidDelta:
    """A delta directory that cannot be used, and why."""

    path: Path
    problem: BertologyError

    @property
    def reason(self) -> str:
        return str(self.problem)


def is_delta(directory: Path) -> bool:
    """Whether a directory is meant to hold a delta, ours or peft's; it may be a broken one."""
    return os.path.lexists(directory / MANIFEST) or os.path.lexists(directory / ADAPTER_CONFIG)


def identify(
    directory: Path, limits: Limits | None = None, root: Path | None = None, name: str | None = None
) -> DeltaVersion:
    """Which version of which delta a directory is.

    ``name`` is what its delta is called where the place says so (``NAME/VERSION`` below a root, or who asks knows it);
    nothing is read then but what a bare version is the hash of. Whether ``delta.json`` says the same shows when it is
    loaded (``check_called``). Files must lie under ``root`` (default: ``directory``). Raises FormatError.
    """
    limits, root, place = limits or Limits(), root or directory, Path(os.path.abspath(directory))
    with untrusted(directory):
        own, data = os.path.lexists(directory / MANIFEST), b""
        if name is None and own:
            values, data = read_json(directory / MANIFEST, limits, root)
            name = check_name(values.get("name"), f"{directory / MANIFEST}: name")
        name = check_name(place.name if name is None else name, "delta name")
        if place.parent.name == name:
            return DeltaVersion(name, check_name(place.name, "version"), directory, bare=False)
        if not data and own:
            data = read_bytes(directory / MANIFEST, limits.json_bytes, root)
        elif not own:
            data = read_bytes(directory / ADAPTER_CONFIG, limits.json_bytes, root)
            data += read_bytes(directory / ADAPTER_WEIGHTS, limits.file_bytes, root)
        return DeltaVersion(name, hashlib.sha256(data).hexdigest()[:VERSION_DIGITS], directory, bare=True)


def check_called(directory: Path, held: str, name: str | None) -> None:
    """FormatError where the delta that a directory holds is not the one that its place says."""
    if name not in (None, held):
        raise FormatError(f"{directory} holds delta {held!r}, not {name!r}; rename the directory or the delta")


def survey(
    root: Path, limits: Limits | None = None, name: str | None = None
) -> tuple[dict[str, list[DeltaVersion]], list[InvalidDelta]]:
    """The deltas under ``root`` by name, each with its versions, the newest last; and what cannot be identified.

    ``root`` may be a delta directory itself. Hidden entries (``.name``) are passed over, so that what is being written
    is not seen. Versions are ordered as people number them (2 before 10); bare directories come before them, by the
    time that their ``delta.json`` was written; of two copies of one version the later path is taken. What lies outside
    ``root`` is refused. With ``name`` only that delta is looked for, and what might be it. Raises NotFound without
    ``root``, FormatError where it cannot be read.
    """
    if not root.is_dir():
        raise NotFound(f"no directory {root}; expected one with deltas in it (NAME/VERSION/ or bare)")
    found: dict[tuple[str, str], tuple[tuple[object, ...], DeltaVersion]] = {}
    refused: list[InvalidDelta] = []
    with untrusted(root):
        for path, holder in _directories(root, name, refused):
            try:
                one = identify(path, limits, root, holder)
                with untrusted(path):
                    found[one.name, one.version] = (_age(one), one)
            except BertologyError as problem:
                refused.append(InvalidDelta(path, problem))
    deltas: dict[str, list[DeltaVersion]] = {}
    for _, one in sorted(found.values(), key=lambda entry: (entry[1].name, *entry)):
        if name in (None, one.name):
            deltas.setdefault(one.name, []).append(one)
    return deltas, refused


def discover(root: Path, limits: Limits | None = None) -> dict[str, list[DeltaVersion]]:
    """What ``survey`` finds; raises what is wrong with the first directory that it refuses."""
    deltas, refused = survey(root, limits)
    for one in refused:
        raise one.problem
    return deltas


def find(root: Path, name: str, version: str | None = None) -> Path:
    """The directory of a delta's version (``None``: the newest); raises NotFound naming the nearest known."""
    deltas = discover(root)
    if name not in deltas:
        raise NotFound(f"no delta {name[:80]!r} in {root}; {nearest(name[:80], deltas)}")
    if version is None:
        return deltas[name][-1].path
    known = {one.version: one.path for one in deltas[name]}
    if version not in known:
        raise NotFound(f"delta {name!r} has no version {version[:80]!r}; {nearest(version[:80], known)}")
    return known[version]


def versions(
    root: Path, name: str, limits: Limits | None = None, refused: list[InvalidDelta] | None = None
) -> dict[str, DeltaVersion]:
    """One delta's versions under ``root``, the newest last; other deltas' faults do not matter.

    What cannot be identified, and might be that delta, goes to ``refused``. Raises NotFound where there is no version,
    FormatError for a name that cannot be one and for what points outside.
    """
    deltas, bad = survey(root, limits, check_name(name, "delta name"))
    if refused is not None:
        refused += bad
    if not deltas:
        for one in bad:
            if one.path.relative_to(root).parts[:1] in ((), (name,)):
                raise one.problem
        raise NotFound(f"no delta {name!r} in {root}; expected {name}/VERSION/{MANIFEST} there")
    return {one.version: one for one in deltas[name]}


def check_place(target: Path, name: str) -> None:
    """FormatError where delta ``name``, written to ``target``, would not be seen, would hide others, or be misnamed."""
    place = Path(os.path.abspath(target))
    with untrusted(target):
        if is_delta(place.parent):
            raise FormatError(
                f"{place.parent} is a delta itself, so {target} below it would not be seen; move that delta to a "
                f"version of its own ({place.parent / 'VERSION'}), or choose another place"
            )
        below = _children(target) if target.is_dir() and not is_delta(target) else []
        if any(map(is_delta, below)):
            raise FormatError(
                f"{target} holds deltas, which one written there would hide; write it to {target / 'VERSION'} "
                "(train: --version), or choose another place"
            )
        beside = _children(place.parent) if place.parent.is_dir() and place.parent.name != name else []
        known = next(filter(None, (_held(path) for path in beside if path != place)), None)
        if known == place.parent.name:
            raise FormatError(
                f"{place.parent} holds versions of delta {place.parent.name!r}; one of {name!r} cannot lie there: give "
                f"it that name (train: --out {place.parent} --version {place.name}), or choose another place"
            )


def _held(directory: Path) -> str | None:
    """The name in a directory's ``delta.json``; ``None`` where there is none that can be read."""
    try:
        return identify(directory).name if os.path.lexists(directory / MANIFEST) else None
    except BertologyError:
        return None


def _directories(root: Path, name: str | None, refused: list[InvalidDelta]) -> Iterator[tuple[Path, str | None]]:
    """Delta directories, with the name of the directory that holds them where that is below ``root``."""
    if is_delta(root):
        yield root, None
        return
    for child in _inside(root, root, refused):
        try:
            if is_delta(child):
                if name in (None, child.name) or os.path.lexists(child / MANIFEST):
                    yield child, None
                continue
            below = _inside(child, root, refused) if name in (None, child.name) else []
            yield from [(path, child.name) for path in below if is_delta(path)]
        except OSError as problem:
            refused.append(
                InvalidDelta(child, FormatError(f"cannot read {child}: {problem.strerror}; check its permissions"))
            )


def _inside(directory: Path, root: Path, refused: list[InvalidDelta]) -> list[Path]:
    """The directories in a directory; those that are links to what lies outside ``root`` are refused."""
    found, real = [], os.path.realpath(root)
    for path in _children(directory):
        target = os.path.realpath(path)
        if Path(target).is_relative_to(real):
            found.append(path)
        else:
            outside = f"{path} points outside {root}, to {target}; copy the directory there (cp -rL)"
            refused.append(InvalidDelta(path, FormatError(outside)))
    return found


def _children(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if not path.name.startswith(".") and path.is_dir())


def _age(one: DeltaVersion) -> tuple[object, ...]:
    if one.bare:
        marker = MANIFEST if os.path.lexists(one.path / MANIFEST) else ADAPTER_CONFIG
        return 0, (one.path / marker).stat().st_mtime_ns, one.version
    parts = re.split(r"(\d+)", one.version)
    return 1, *((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part)


def newest(directory: Path) -> Path:
    """The delta's directory itself, or its newest version where it is ``NAME`` of ``NAME/VERSION``."""
    if is_delta(directory) or not directory.is_dir():
        return directory
    found = discover(directory)
    if len(found) > 1:
        raise InputError(f"{directory} holds {len(found)} deltas; give one of them: {', '.join(sorted(found))}")
    return next(iter(found.values()))[-1].path if found else directory
