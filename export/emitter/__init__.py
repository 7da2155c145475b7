"""The emitter: a BERT-like encoder's weights become an ONNX graph by its formula, without tracing."""

from __future__ import annotations
