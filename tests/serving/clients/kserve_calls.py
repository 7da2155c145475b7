"""What kserve's own REST client is asked to do: run by a Python that has kserve, with the server's address."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

TEXTS = ["the cat was good", "a dog"]


async def main(url: str) -> None:
    """Prints what the client found, as JSON."""
    import numpy as np
    from kserve import InferenceRESTClient, InferInput, InferRequest
    from kserve.inference_client import RESTConfig

    found: dict[str, Any] = {}
    async with InferenceRESTClient(RESTConfig(protocol="v2", timeout=120)) as client:
        found["server"] = [await client.is_server_live(url), await client.is_server_ready(url)]
        found["model"] = await client.is_model_ready(url, "mood")
        for binary in (False, True):
            tensor = InferInput("text", [2], "BYTES")
            tensor.set_data_from_numpy(np.array([text.encode() for text in TEXTS], object), binary_data=binary)
            answer = await client.infer(url, InferRequest(model_name="mood", infer_inputs=[tensor]), model_name="mood")
            found["binary" if binary else "json"] = {one.name: one.as_numpy().tolist() for one in answer.outputs}
        try:
            tensor = InferInput("text", [1], "BYTES", data=["x"])
            await client.infer(url, InferRequest(model_name="moot", infer_inputs=[tensor]), model_name="moot")
        except Exception as problem:  # httpx's, of that environment
            found["unknown"] = str(problem)
    async with InferenceRESTClient(RESTConfig(protocol="v1", timeout=120)) as client:
        found["first"] = {
            "server": await client.is_server_live(url),
            "model": await client.is_model_ready(url, "mood"),
            "predictions": (await client.infer(url, {"instances": TEXTS}, model_name="mood"))["predictions"],
        }
    print(json.dumps(found, default=lambda value: value.decode()))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
