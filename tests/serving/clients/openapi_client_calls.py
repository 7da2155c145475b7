"""What a client generated from the OpenAPI document is asked to do: run by a Python that has ``made``, with the
server's address and a key."""

from __future__ import annotations

import json
import sys
from typing import Any

TEXTS = ["the cat was good", "a dog"]


def main(url: str) -> None:
    """Prints what the client found, as JSON."""
    from made import AuthenticatedClient, models
    from made.api.default import (
        ask_model,
        classify,
        create_embeddings,
        embed,
        get_config,
        get_health,
        get_metadata_version,
        infer,
        list_models,
        predict,
        predict_v1,
        rerank_v2,
        score,
    )

    with AuthenticatedClient(url, token="none", timeout=120) as client:
        pair = {"model": "grade", "query": "a dog", "documents": TEXTS}
        tensor = models.InputTensor(name="text", shape=[2], datatype="BYTES", data=TEXTS)

        def call(operation: Any, *names: str, **body: Any) -> Any:
            return operation.sync(*names, client=client, **body)

        found: dict[str, Any] = {
            "health": call(get_health).to_dict(),
            "models": [one.name for one in call(list_models)],
            "version": call(get_metadata_version, "mood", "1").versions,
            "config": call(get_config, "mood").to_dict()["name"],
            "one": call(predict, body=models.Item(delta="mood", text=TEXTS[0])).label,
            "many": [one.label for one in call(predict, body=[models.Item(delta="mood", text=text) for text in TEXTS])],
            "task": call(ask_model, "mood", body=models.TaskBody(inputs=TEXTS[0]))[0][0]["label"],
            "infer": call(infer, "mood", body=models.InferRequest(inputs=[tensor])).outputs[0].data,
            "embeddings": len(call(create_embeddings, body=models.EmbeddingsBody("sense", TEXTS)).data[1].embedding),
            "embed": len(call(embed, body=models.TeiBody(TEXTS))[1]),
            "rerank": len(call(rerank_v2, body=models.RerankBody(**pair)).results),
            "score": len(call(score, body=models.ScoreBody("grade", TEXTS[0], TEXTS)).data),
            "classify": [one.label for one in call(classify, body=models.ClassifyBody("mood", TEXTS)).data],
            "predict_v1": [one.label for one in call(predict_v1, "mood", body=models.PredictBody(TEXTS)).predictions],
            "unknown": call(predict, body=models.Item(delta="moot", text="a")).error,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
