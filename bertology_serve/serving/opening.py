"""The deltas of a server and what runs them: in this process, or in one of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.encoder.residents import Residents
from bertology_serve.serving.background import Background
from bertology_serve.serving.process.forks import Nursery
from bertology_serve.serving.process.remote import Remote
from bertology_serve.serving.settling import Setting, apply

Executor = Literal["thread", "process"]


@dataclass(frozen=True)
class Opened:
    """``settle`` says what runs the batches, once there are deltas: the engine's name, and what was found; ``warmed``
    that batches now take what they should; ``close`` gives everything back.
    """

    pipeline: Residents
    device: str
    settle: Callable[[Setting], tuple[str, Setting]]
    warmed: Callable[[float], None] = lambda seconds: None
    close: Callable[[], None] = lambda: None


def open_backbone(
    backbone: str,
    device: str,
    dtype: torch.dtype,
    nursery: Nursery | None = None,
    background: Background | None = None,
) -> Opened:
    """An encoder without deltas: loaded here, or with a ``nursery`` the one that it has loaded."""
    if nursery is not None:
        remote = Remote(nursery, backbone, device, dtype, background)
        return Opened(remote, device, remote.settle, remote.patience, remote.close)
    pipeline = Pipeline(Encoder.load(backbone, device=device, dtype=dtype))
    return Opened(pipeline, device, partial(apply, pipeline))
