from __future__ import annotations

import sys

import numpy as np
import pytest

from bertology_serve.errors import Unsupported, VerificationError
from bertology_serve.export.session import Session, answer


def test_without_onnx_runtime_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Unsupported, match=r"pip install 'bertology-serve\[cpu\]', or 'bertology-serve\[gpu\]'"):
        Session(tmp_path / "model.onnx")


def test_a_file_that_cannot_be_loaded_is_a_failed_verification(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(VerificationError, match=r"^ONNX Runtime \S+ cannot load the file: [^\n]+$"):
        Session(tmp_path / "model.onnx")


def test_the_answer_of_files_new_and_old():
    """Files of earlier versions have one output: ``logits``, of answers in texts [B, L, 2], or ``embedding``."""
    start, end, rows, pooled = np.zeros((2, 5)), np.ones((2, 5)), np.ones((2, 5, 3)), np.ones((2, 3))
    both = answer({"start_logits": start, "end_logits": end})
    assert both.shape == (2, 5, 2)
    assert np.array_equal(both, answer({"logits": np.stack([start, end], -1)}))
    assert answer({"last_hidden_state": rows, "sentence_embedding": pooled}) is pooled
    assert answer({"embedding": pooled}) is pooled
