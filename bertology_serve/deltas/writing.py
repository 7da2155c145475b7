"""Writes a delta directory so that nothing half-written ever stands under its name.

Everything is written and flushed in a hidden directory beside the target, which then takes its place. Into a directory
that holds other things too (a training log, say) the files are moved one by one, ``delta.json`` and
``adapter_config.json`` last: without them it is no delta.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bertology_serve.deltas.manifest import FileRecord
from bertology_serve.deltas.names import ADAPTER_CONFIG, FILES, MANIFEST
from bertology_serve.errors import FormatError
from bertology_serve.files import flush, hidden, replace_directory


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A hidden empty directory beside ``target``, removed at the end unless ``publish`` took it.

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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Writes a safetensors file; what it must be from then on."""
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}  # no shared memory
    save_file(copies, path, {"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read; the umask decides here
    return file_record(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON for people to read too."""
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def file_record(path: Path) -> FileRecord:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def publish(stage: Path, target: Path) -> None:
    """Moves the files of ``stage`` to ``target``, flushed to the disk before they are seen."""
    if target.exists() and not target.is_dir():
        raise FormatError(f"{target} is a file; expected a directory to write the delta to")
    if target.exists() and any(path.name not in FILES for path in target.iterdir()):
        _move_files(stage, target)
    else:
        replace_directory(stage, target)


def _move_files(stage: Path, target: Path) -> None:
    for path in stage.iterdir():
        flush(path)
    for name in (ADAPTER_CONFIG, MANIFEST):
        (target / name).unlink(missing_ok=True)
    for name in FILES:
        if (stage / name).exists():
            (stage / name).replace(target / name)
        else:
            (target / name).unlink(missing_ok=True)
    flush(target)
