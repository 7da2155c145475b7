"""What was found of this machine at an earlier start: which engine is faster, and how long batches take.

One small JSON file for each set of circumstances (processor, versions, threads, weights, options), in the user's cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from bertology_serve.encoder.residents import Residents
from bertology_serve.errors import DataError
from bertology_serve.export.bench.environment import environment
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.files import writing
from bertology_serve.serving.settling import Setting
from bertology_serve.serving.times import Rung

log = logging.getLogger(__name__)
DAYS = 7.0  # after which it is found anew
SETTLED = ("cpu", "cores", "threads", "versions")  # of the environment: what does not change by itself


@dataclass(frozen=True)
class Findings:
    """``setting`` as it was settled; ``ladder`` how long batches took."""

    setting: Setting
    ladder: tuple[Rung, ...]


def circumstances(pipeline: Residents, setting: Setting, config: ServerConfig, device: str) -> dict[str, Any]:
    """All that findings follow from."""
    here = environment()
    return {
        **{name: here[name] for name in SETTLED},
        "weights": pipeline.encoder.ref.sha256,
        "dtype": str(pipeline.encoder.dtype),
        "device": device,
        "executor": type(pipeline).__name__,
        "setting": asdict(setting),
        "batch": [config.max_batch_ms, config.max_batch_tokens],
    }


def recall(where: Mapping[str, Any], folder: Path | None = None) -> Findings | None:
    """What was found in the same circumstances within the last week, ``None`` where nothing was that can be read."""
    path = _path(where, folder)
    try:
        if time.time() - path.stat().st_mtime > DAYS * 86_400:
            return None
        found = msgspec.json.decode(path.read_bytes(), type=Findings)
    except (OSError, ValueError):
        return None
    return found if found.ladder and all(min(rung) > 0 for rung in found.ladder) else None


def keep(where: Mapping[str, Any], findings: Findings, folder: Path | None = None) -> None:
    """Writes them down; where that cannot be, the next start measures again."""
    path = _path(where, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(str(path)) as file:
            file.write(msgspec.json.encode(findings))
    except (OSError, DataError) as problem:
        log.info("what was timed is not kept: %s", problem)


def _path(where: Mapping[str, Any], folder: Path | None) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(msgspec.json.encode(where, order="sorted")).hexdigest()
    return (folder or home / "bertology-serve" / "findings") / f"{digest[:32]}.json"
