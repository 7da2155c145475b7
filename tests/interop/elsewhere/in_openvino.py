"""``python in_openvino.py DIR INPUTS``: every output of the file for int64 inputs by name, as JSON."""

import json
import sys

import numpy as np
import openvino

model = openvino.Core().compile_model(f"{sys.argv[1]}/onnx/model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
given = {name: np.array(rows, np.int64) for name, rows in json.loads(sys.argv[2]).items()}
found = model({one.any_name: given[one.any_name] for one in model.inputs})
print(json.dumps({name: found[one].tolist() for one in model.outputs for name in one.names}))
