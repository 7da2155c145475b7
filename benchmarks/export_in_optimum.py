"""Loads an export of ``--layout hf`` in optimum and compares its answers with ONNX Runtime's own.

    ENVIRONMENT/bin/python benchmarks/export_in_optimum.py DIR

Runs in an environment of its own (torch, transformers==4.57.6, optimum-onnx[onnxruntime]==0.1.0): optimum's pins
exclude this package's, so nothing of this package is imported. Exits with 1 where they differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import transformers
from optimum import onnxruntime as optimum
from optimum.version import __version__

CLASSES = {
    "classification": "ORTModelForSequenceClassification",
    "regression": "ORTModelForSequenceClassification",
    "token-classification": "ORTModelForTokenClassification",
    "question-answering": "ORTModelForQuestionAnswering",
    "embedding": "ORTModelForFeatureExtraction",
}
READ = {"question-answering": ("start_logits", "end_logits"), "embedding": ("last_hidden_state",)}
TEXTS = ["A charming and often affecting journey.", "No.", "The ferry leaves at seven, and the last bus is late."]


def main(directory: Path) -> int:
    """Prints one line."""
    facts: dict[str, Any] = json.loads((directory / "config.json").read_text())["bertology_serve"]
    kind = getattr(optimum, CLASSES[facts["task"]])
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    model = kind.from_pretrained(directory, file_name="model.onnx", subfolder="onnx", trust_remote_code=False)
    session = onnxruntime.InferenceSession(str(directory / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    names = {one.name for one in session.get_inputs()}
    inputs = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    inputs = {name: tensor for name, tensor in inputs.items() if name in names}
    read = READ.get(facts["task"], ("logits",))
    expected = session.run(read, {name: tensor.numpy() for name, tensor in inputs.items()})
    found = model(**inputs)
    off = max(float(np.abs(np.asarray(found[name]) - own).max()) for name, own in zip(read, expected, strict=True))
    versions = f"optimum {__version__}, transformers {transformers.__version__}, onnxruntime {onnxruntime.__version__}"
    labels = getattr(model.config, "id2label", None)
    print(f"{versions}: {kind.__name__}, {facts['task']}, labels {labels}, max |Δ| {off:.1e}")
    return int(off != 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
