"""``python in_optimum_intel.py DIR INPUTS``: every output of an OpenVINO file for int64 inputs by name, as JSON."""

import json
import sys
from pathlib import Path

import torch
from optimum import intel

CLASSES = {
    "classification": intel.OVModelForSequenceClassification,
    "token-classification": intel.OVModelForTokenClassification,
    "question-answering": intel.OVModelForQuestionAnswering,
    "embedding": intel.OVModelForFeatureExtraction,
}
kind = CLASSES[json.loads(Path(sys.argv[1], "config.json").read_text())["bertology_serve"]["task"]]
model = kind.from_pretrained(sys.argv[1], ov_config={"INFERENCE_PRECISION_HINT": "f32"}, trust_remote_code=False)
found = model(**{name: torch.tensor(rows) for name, rows in json.loads(sys.argv[2]).items()})
print(json.dumps({name: rows.tolist() for name, rows in found.items()}))
