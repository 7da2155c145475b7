"""A client that ``openapi-python-client`` generates from the document, over a real socket. That generator's pins
exclude ours (typer): it needs its own Python, named by BERTOLOGY_OPENAPI_PYTHON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from bertology_serve.serving.http.openapi import document
from tests.serving.conftest import DELTAS

PYTHON = os.environ.get("BERTOLOGY_OPENAPI_PYTHON", "")
needed = pytest.mark.skipif(
    not PYTHON,
    reason="openapi-python-client excludes this environment's versions: python -m venv K && "
    "K/bin/pip install openapi-python-client==0.29.1, then BERTOLOGY_OPENAPI_PYTHON=K/bin/python",
)


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@needed
def test_a_generated_client(server, tmp_path):
    (tmp_path / "openapi.json").write_text(json.dumps(document()))
    (tmp_path / "config.yaml").write_text("post_hooks: []\n")
    made = ["--path", str(tmp_path / "openapi.json"), "--config", str(tmp_path / "config.yaml"), "--meta", "none"]
    run(PYTHON, "-m", "openapi_python_client", "generate", *made, "--output-path", str(tmp_path / "made"),
        "--fail-on-warning")  # fmt: skip
    script = Path(__file__).with_name("openapi_client_calls.py")
    found = json.loads(run(PYTHON, str(script), server.url.rstrip("/"), PYTHONPATH=str(tmp_path)))
    items = [{"delta": "mood", "text": text} for text in ("the cat was good", "a dog")]
    labels = [one["label"] for one in server.post("/predict", items).json()]
    assert set(found.pop("models")) == {"base", *DELTAS}
    assert "no delta 'moot'" in found.pop("unknown")
    assert found == {
        "health": {"status": "ready"}, "version": ["1"], "config": "mood", "one": labels[0], "many": labels,
        "task": labels[0], "infer": labels, "embeddings": 32, "embed": 32, "rerank": 2, "score": 2,
        "classify": labels, "predict_v1": labels,
    }  # fmt: skip
