"""Export: a delta folded into its encoder's weights or standing beside them, as ONNX, verified against torch.

``bertology_serve.export(delta, out)`` is a call of this package: a package hides a function of its name.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bertology_serve.export.exporting import Exported


class _Callable(ModuleType):
    def __call__(self, *values: object, **named: object) -> Exported:
        """See ``exporting.export``."""
        done: Exported = import_module("bertology_serve.export.exporting").export(*values, **named)
        return done


sys.modules[__name__].__class__ = _Callable
