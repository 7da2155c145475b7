"""Deltas to and from the HuggingFace hub: a repository is a delta's directory. Pickles are never fetched."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bertology_serve.deltas import store
from bertology_serve.deltas.catalog import ADAPTER_CONFIG, MANIFEST, check_place
from bertology_serve.deltas.store import publish
from bertology_serve.errors import FormatError, InputError, one_line
from bertology_serve.files import staging

PATTERNS = ["*.json", "*.safetensors", "*.md", "log.jsonl"]
_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


def push(directory: Path, repository: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads a delta that can be loaded, making the repository where it is not there; returns the commit's address.

    The hub's own login or ``HF_TOKEN`` says who does it. Raises InputError with the hub's reason.
    """
    _check(repository)
    delta = store.load(directory)
    from huggingface_hub import HfApi

    with _asked(repository):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            allow_patterns=PATTERNS,
            revision=revision,
            commit_message=f"{delta.name} ({' + '.join(delta.kinds)}, {delta.task.kind})",
        )
    return str(done)


def pull(repository: str, out: Path, *, revision: str | None = None) -> Path:
    """Downloads a delta to ``out``, which appears whole or not at all: one of this package is checked first.

    A directory of peft's or AdapterHub's is taken as it is. Raises InputError, and FormatError for what is no delta.
    """
    _check(repository)
    if out.exists():
        raise InputError(f"{out} exists; choose another --out")
    from huggingface_hub import snapshot_download

    with tempfile.TemporaryDirectory() as folder:
        with _asked(repository):
            snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=PATTERNS)
        found = Path(folder)
        name = Path(os.path.abspath(out)).parent.name  # what peft's may be called there, whatever it is
        if (found / MANIFEST).exists():
            name = store.load(found).name
        elif not (found / ADAPTER_CONFIG).exists():
            raise FormatError(f"{repository} holds no delta: it lacks {MANIFEST} and {ADAPTER_CONFIG}")
        check_place(out, name)
        with staging(out) as stage:
            for path in found.iterdir():
                if path.is_file() and not path.is_symlink():
                    shutil.copy(path, stage)
            publish(stage, out)
    return out


def _check(repository: str) -> None:
    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"{repository[:100]!r} is no hub repository; expected OWNER/NAME")


@contextmanager
def _asked(repository: str) -> Iterator[None]:
    """The hub's failures in one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the hub does not serve {repository}: {one_line(error)}") from None
