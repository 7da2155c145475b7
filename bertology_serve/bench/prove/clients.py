"""Figure 14: other people's client libraries work as they are; those that are installed here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.stage import ADMIN, HEADERS, Served, Stage

TEXT = "the river bank was very cold"
Use = Callable[[Served], bool]


def measure(stage: Stage) -> Measured:
    """One server; each library asks it what it is for. The test suite asks more."""
    passed: list[str] = []
    failed: list[str] = []
    absent: list[str] = []
    with stage.server(stage.zoo) as served:
        for name, (module, use) in CLIENTS.items():
            if importlib.util.find_spec(module) is None:
                absent.append(name)
                continue
            try:
                (passed if use(served) else failed).append(name)
            except Exception as problem:  # what is looked for
                failed.append(f"{name} ({type(problem).__name__})")
    words = f"pass: {', '.join(passed) or 'none'}; fail: {', '.join(failed) or 'none'}"
    words += f"; not installed: {', '.join(absent)}" if absent else ""
    return Measured(words, bool(passed) and not failed, {"passed": passed, "failed": failed, "absent": absent})


def _openai(served: Served) -> bool:
    import openai

    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=ADMIN, max_retries=0) as client:
        names = {model.id for model in client.models.list()}
        vectors = client.embeddings.create(model="sense", input=[TEXT, "another"]).data
    return "mood" in names and len(vectors) == 2 and len(vectors[0].embedding) > 1


def _hub(served: Served) -> bool:
    from huggingface_hub import InferenceClient

    def client(name: str) -> Any:
        return InferenceClient(provider="hf-inference", model=f"{served.url}/models/{name}", token=ADMIN)

    (first, *_) = client("mood").text_classification(TEXT)
    client("names").token_classification(TEXT)
    (same,) = client("sense").sentence_similarity(TEXT, [TEXT])
    return first.label in ("bad", "good", "so-so") and abs(same - 1) < 1e-4


def _triton(served: Served) -> bool:
    import numpy as np
    import tritonclient.http as triton

    client = triton.InferenceServerClient(served.url.removeprefix("http://"))
    try:
        tensor = triton.InferInput("text", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([TEXT.encode()], object))
        found = client.infer("mood", [tensor], headers=dict(HEADERS))  # it writes into them
        stats = client.get_inference_statistics("mood", headers=HEADERS)
        index = client.get_model_repository_index(headers=HEADERS)
    finally:
        client.close()
    return found.as_numpy("scores").shape == (1, 3) and bool(stats["model_stats"]) and bool(index)


def _tei(served: Served) -> bool:
    from tei_client import HttpClient

    client = HttpClient(f"{served.url}/tei/sense", headers=HEADERS, timeout=30)
    try:
        return len(client.embed([TEXT, "another"])) == 2
    finally:
        client.client.close()


def _own(served: Served) -> bool:
    from bertology_serve.client import Client

    with Client(served.url, ADMIN) as client:
        return client.ask("mood", TEXT).label in ("bad", "good", "so-so") and client.ready()


CLIENTS: dict[str, tuple[str, Use]] = {
    "openai": ("openai", _openai),
    "huggingface_hub": ("huggingface_hub", _hub),
    "tritonclient": ("tritonclient", _triton),
    "tei-client": ("tei_client", _tei),
    "bertology_serve.client": ("bertology_serve", _own),
}
