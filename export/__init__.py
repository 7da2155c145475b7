"""Export: a delta folded into its encoder's weights or standing beside them, as ONNX, verified against torch.

``bertology_serve.export(delta, out)`` is a call of this package: a package hides a function of its name.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *values: Any, **named: Any) -> Any:
        """See ``exporting.export``."""
        from bertology_serve.export.exporting import export

        return export(*values, **named)


sys.modules[__name__].__class__ = _Callable
