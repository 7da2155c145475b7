"""``python in_sentence_transformers.py DIR TEXTS BACKEND``: embeddings of that backend, as JSON."""

import json
import sys

from sentence_transformers import SentenceTransformer

OPTIONS = {
    "onnx": {"file_name": "onnx/model.onnx"},
    "openvino": {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}},
}
model = SentenceTransformer(sys.argv[1], backend=sys.argv[3], device="cpu", model_kwargs=OPTIONS[sys.argv[3]])
print(json.dumps({"sentence_embedding": model.encode(json.loads(sys.argv[2])).tolist()}))
