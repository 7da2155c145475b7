"""Workers without processes of their own: the same requests, in seconds less each."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from bertology_serve.bench.cpu import worker_process
from bertology_serve.bench.cpu.worker import Worker
from bertology_serve.errors import Unsupported


class InProcess:
    """As ``WorkerProcess``; ``asked`` are the requests of all."""

    asked: ClassVar[list[tuple[str, Mapping[str, Any]]]] = []

    def __init__(self, python: str, builders: str, threads: int) -> None:
        self._worker = Worker(runpy.run_path(str(Path(worker_process.__file__).with_name(f"{builders}.py"))))

    def ask(self, do: str, **fields: Any) -> Mapping[str, Any]:
        self.asked.append((do, fields))
        try:
            return getattr(self._worker, do)(**fields)
        except Exception as problem:
            raise Unsupported(f"{do}: {type(problem).__name__}: {problem}") from None

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass
