"""Processor seconds of a training, by the same clock for either side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import transformers

from bertology_serve.training.trainer import NoCallback


class Clock(transformers.TrainerCallback, NoCallback):  # type: ignore[misc]
    """Processor seconds between the beginning of training and its last step: a busy machine moves them less."""

    def __init__(self) -> None:
        self.start = self.seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Trainer begins."""
        self.start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Trainer has made a step."""
        self.seconds = time.process_time() - self.start

    def began(self, step: int, total: int, parameters: Any) -> None:
        """Ours begins."""
        self.start = time.process_time()

    def stepped(self, line: Mapping[str, Any]) -> None:
        """Ours has made a step."""
        self.seconds = time.process_time() - self.start
