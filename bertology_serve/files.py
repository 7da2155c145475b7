"""Files and directories that are replaced whole: at every moment, also that of a kill, the old one is there or the new.

For all that writes something that others read. Everything is written under a hidden name beside its place first.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bertology_serve.errors import FormatError, SpecError

JsonObject = dict[str, Any]
"""A JSON object as Python holds it."""
JsonMapping = Mapping[str, Any]
"""One that is only read."""
CACHE = "BERTOLOGY_CACHE"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


def flush(path: Path) -> None:
    """Waits until the disk holds a file, or a directory's entries. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hidden(path: Path) -> Path:
    """A name beside ``path`` that nothing else has."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden name to write a file under; at the end it becomes ``path``, or is removed where anything was raised."""
    own = hidden(path)
    try:
        yield own
        flush(own)
        os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)


def cache_folder(name: str) -> Path | None:
    """This user's own folder of that name for what can be made again, made where it is not there.

    It stands in ``BERTOLOGY_CACHE``, else in ``bertology-serve`` of the user's cache. ``None`` where that variable is
    empty, where the folder is another user's, and where none can be made.
    """
    told = os.environ.get(CACHE)
    if told == "":
        return None
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = (Path(told) if told else home / "bertology-serve") / name
        folder.mkdir(parents=True, exist_ok=True)
        if not is_own(folder):
            return None
        folder.chmod(0o700)
    except (OSError, RuntimeError):  # no home
        return None
    return folder


def is_own(path: Path) -> bool:
    """Whether a file or directory is this user's. Raises OSError."""
    return path.stat().st_uid == getattr(os, "geteuid", int)()


def check_outputs(outputs: Iterable[str | Path | None], inputs: Iterable[str | Path | None]) -> None:
    """Raises SpecError for a file that would be written twice, or over what is read. ``-`` and devices are no files."""
    taken = {Path(one).resolve(): "is what is read" for one in inputs if one}
    for path in outputs:
        place = Path(path or "-").resolve()
        if str(path or "-") == "-" or (place.exists() and not place.is_file()):
            continue
        if place in taken:
            raise SpecError(f"{path} {taken[place]}; give another file to write to")
        taken[place] = "is written already"


def write_json(path: Path, values: object) -> None:
    """Writes JSON for people to read too, whole or not at all. What UTF-8 lacks (bytes of odd names) is escaped."""
    with replacing(path) as own:
        own.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A hidden empty directory beside ``target``, removed at the end unless it was moved.

    What the disk refuses inside the block is a FormatError.
    """
    stage = hidden(target.resolve())
    try:
        stage.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
        yield stage
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
        raise FormatError(f"cannot write {target}: {reason}; free the disk or choose another directory") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def replace_directory(stage: Path, target: Path) -> None:
    """The directory ``stage`` becomes ``target``, all its files on the disk before.

    What stood there lies at ``stage`` then, for the caller to remove. Both must be on one file system. Raises OSError,
    and nothing has changed. Where a file system cannot exchange two names (most of Linux's can), a process that dies
    between two renames leaves the old directory as ``.NAME.old``; the next replacement puts it back first.
    """
    target = target.resolve()  # through links, so that a link stays one
    for path in (*stage.rglob("*"), stage):
        if not path.is_symlink():
            flush(path)
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        os.rename(old, target)
    if not target.exists():
        os.rename(stage, target)
    elif not _exchanged(stage, target):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        try:
            os.rename(stage, target)
        except BaseException:
            os.rename(old, target)
            raise
        os.rename(old, stage)
    flush(target.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Gives two directories each other's names, in one step; false where the system cannot. Raises OSError."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number), str(other))
