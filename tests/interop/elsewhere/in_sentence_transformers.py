"""``python in_sentence_transformers.py DIR TEXTS``: embeddings of the ONNX backend, as JSON."""

import json
import sys

from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], backend="onnx", device="cpu", model_kwargs={"file_name": "onnx/model.onnx"})
print(json.dumps({"sentence_embedding": model.encode(json.loads(sys.argv[2])).tolist()}))
