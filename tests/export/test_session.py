from __future__ import annotations

import sys

import pytest

from bertology_serve.errors import Unsupported, VerificationError
from bertology_serve.export.session import Session


def test_without_onnx_runtime_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Unsupported, match=r"pip install 'bertology-serve\[cpu\]', or 'bertology-serve\[gpu\]'"):
        Session(tmp_path / "model.onnx")


def test_a_file_that_cannot_be_loaded_is_a_failed_verification(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(VerificationError, match=r"^ONNX Runtime \S+ cannot load the file: [^\n]+$"):
        Session(tmp_path / "model.onnx")
