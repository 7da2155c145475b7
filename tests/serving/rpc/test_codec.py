from __future__ import annotations

import json

from bertology_serve.serving.grpc_server import write_infer
from bertology_serve.serving.protocol.oip import read_infer


def test_what_was_cut_is_told(registry):
    texts = ["cat", "the cat was good " * 40]
    body = {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": texts}]}
    call = read_infer(json.dumps(body).encode(), None, registry.find("mood"), registry.find, 9)
    jobs = [registry.pipeline.prepare(request) for request in call.requests]
    assert write_infer(call, registry.pipeline.run(jobs)).parameters["truncated"].string_param == "1"
    assert not write_infer(call, registry.pipeline.run(jobs[:1])).parameters
