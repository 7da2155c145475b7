"""Batches of a fill, nothing in them."""

from __future__ import annotations

import numpy as np

from bertology_serve.bench.export.export_batches import Batches


def batch(name: str, fill: float) -> Batches:
    """Ten rows of ten columns."""
    mask = (np.arange(100).reshape(10, 10) < 100 * fill).astype(np.int64)
    return Batches(name, ({"input_ids": mask, "attention_mask": mask, "token_type_ids": mask},))
