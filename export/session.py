"""ONNX Runtime, imported when it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

from bertology_serve.errors import Unsupported, VerificationError
from bertology_serve.export.export_spec import CPU

LOGITS, START, END, ROWS, POOLED = "logits", "start_logits", "end_logits", "last_hidden_state", "sentence_embedding"
SPARSE_WEIGHTS, VECTORS = "sparse_embedding", "token_embeddings"
"""Names of outputs in the files of single deltas."""


def answer(outputs: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic]:
    """What a file answers, of its outputs by name, also of files that have but one, whatever they call it.

    Logits [B, C] or [B, L, C]; of answers in texts [B, L, 2], start and end; of embeddings [B, H], sparse [B, V],
    multi-vector [B, L, D].
    """
    if START in outputs:
        return np.stack([outputs[START], outputs[END]], -1)
    return outputs[POOLED] if POOLED in outputs else next(iter(outputs.values()))


class Session:
    """A loaded ONNX file. ``asked`` is the provider that was wanted, ``provider`` the one that really runs it: ONNX
    Runtime falls back to the CPU without an error. ``runtime`` is its name and version.

    Raises Unsupported without ONNX Runtime, VerificationError where it cannot load the file.
    """

    def __init__(self, path: Path, provider: str = CPU) -> None:
        runtime = _runtime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = torch.get_num_threads()
        wanted = [name for name in (provider, CPU) if name in runtime.get_available_providers()]
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=list(dict.fromkeys(wanted)))
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            reason = str(error).strip().splitlines()[0][:200]
            raise VerificationError(f"ONNX Runtime {runtime.__version__} cannot load the file: {reason}") from error
        self.asked = provider
        self.provider: str = self._session.get_providers()[0]
        self.runtime = f"onnxruntime {runtime.__version__}"
        self._names = [found.name for found in self._session.get_outputs()]
        self.inputs: tuple[str, ...] = tuple(found.name for found in self._session.get_inputs())

    def run(self, arrays: Mapping[str, NDArray[np.generic]]) -> NDArray[np.float32]:
        """The ``answer``; arrays that the graph does not take are left out."""
        return np.asarray(answer(self.outputs(arrays)))

    def outputs(self, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.float32]]:
        """All outputs, by name."""
        outputs = self._session.run(self._names, {name: arrays[name] for name in self.inputs})
        return dict(zip(self._names, outputs, strict=True))


def silence() -> None:
    """ONNX Runtime says nothing on stderr any more; raises Unsupported where it is not installed."""
    _runtime().set_default_logger_severity(4)


def _runtime() -> ModuleType:
    try:
        return import_module("onnxruntime")
    except ImportError:
        raise Unsupported(
            "ONNX Runtime is not installed, which runs the ONNX engine and verifies every export; "
            "pip install 'bertology-serve[cpu]', or 'bertology-serve[gpu]' with an NVIDIA GPU (never both)"
        ) from None
