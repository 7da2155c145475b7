"""BERTology: what heads, layers and deltas do. One function an analysis, each returns an ``AnalysisReport``.

``report = bs.analysis.heads("minilm", "dev.jsonl", delta="deltas/sentiment")``, then ``report.table`` (rows),
``report.facts``, ``report.plot("heads.png")`` and ``report.save("out")``, which is what the command ``analyze`` writes.
Data are files, data sets, lists of records or frames, as for training; ``settings`` are the options of the command.
The names in ``__all__`` are imported from their modules on first use, which then takes torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bertology_serve.analysis.attention_heads import attention, attention_maps, dependencies
    from bertology_serve.analysis.delta_distance import compare_deltas, distance
    from bertology_serve.analysis.disagreement import compare
    from bertology_serve.analysis.head_importance import heads
    from bertology_serve.analysis.head_pruning import prune
    from bertology_serve.analysis.integrated_gradients import attribution
    from bertology_serve.analysis.probing import probe
    from bertology_serve.analysis.report import AnalysisReport
    from bertology_serve.analysis.settings import (
        AttentionSettings,
        CompareSettings,
        DistanceSettings,
        HeadSettings,
        ProbeSettings,
        PruneSettings,
    )

__all__ = [
    "AnalysisReport",
    "AttentionSettings",
    "CompareSettings",
    "DistanceSettings",
    "HeadSettings",
    "ProbeSettings",
    "PruneSettings",
    "attention",
    "attention_maps",
    "attribution",
    "compare",
    "compare_deltas",
    "dependencies",
    "distance",
    "heads",
    "probe",
    "prune",
]

_HOMES = {
    "AnalysisReport": "report",
    "attention": "attention_heads",
    "attention_maps": "attention_heads",
    "attribution": "integrated_gradients",
    "compare": "disagreement",
    "compare_deltas": "delta_distance",
    "dependencies": "attention_heads",
    "distance": "delta_distance",
    "heads": "head_importance",
    "probe": "probing",
    "prune": "head_pruning",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'settings')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
