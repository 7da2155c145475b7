"""``kserve``, unmodified, over a real socket. Its pins exclude ours (protobuf, pandas, psutil): it needs its own
Python, named by BERTOLOGY_KSERVE_PYTHON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

PYTHON = os.environ.get("BERTOLOGY_KSERVE_PYTHON", "")
needed = pytest.mark.skipif(
    not PYTHON,
    reason="kserve excludes this environment's versions: python -m venv K && K/bin/pip install kserve==0.21.0, "
    "then BERTOLOGY_KSERVE_PYTHON=K/bin/python",
)


@needed
def test_what_the_client_is_told(server):
    script = Path(__file__).with_name("kserve_calls.py")
    done = subprocess.run([PYTHON, str(script), server.url.rstrip("/")], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["server"], found["model"]) == ([True, True], True)
    texts = ["the cat was good", "a dog"]
    right = [
        one["label"] for one in server.post("/predict", [{"delta": "mood", "text": text} for text in texts]).json()
    ]
    for form in ("json", "binary"):
        assert found[form]["label"] == right
        assert len(found[form]["scores"]) == 2
    assert "no delta 'moot'" in found["unknown"]
    assert found["first"]["server"] is found["first"]["model"] is True
    assert [one["label"] for one in found["first"]["predictions"]] == right
