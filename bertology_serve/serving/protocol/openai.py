"""OpenAI's shape: ``/v1/models`` and ``/v1/embeddings``, as its own client sends and parses them. Pure.

A model is a delta; ``parent`` names the encoder that it shares. Vectors go out as numbers, or, as that client asks
unless told otherwise, as base64 of little-endian float32.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Prediction, Request
from bertology_serve.errors import DataError, Unsupported
from bertology_serve.serving.batching.limits import check_items
from bertology_serve.serving.protocol.hf import Options, embedding
from bertology_serve.serving.protocol.json_codec import encode, encode_list, object_of, shown
from bertology_serve.tasks.spec import EMBEDDING

FORMATS = ("float", "base64")
OWNER = "bertology-serve"


@dataclass(frozen=True)
class Receipt:
    """What an answer tells of its call: its id, when it was answered (seconds of 1970), the tokens that it cost."""

    id: str
    created: int
    tokens: int

    @property
    def usage(self) -> dict[str, int]:
        """As the answers have it."""
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens}


@dataclass(frozen=True)
class EmbeddingsCall:
    """One request a text, and how the vectors are wanted."""

    delta: Delta
    requests: list[Request]
    options: Options
    base64: bool


def read_embeddings(body: bytes, find: Callable[[str], Delta], most: float = math.inf) -> EmbeddingsCall:
    """A call of ``POST /v1/embeddings``. Raises DataError, NotFound, Unsupported for token ids and other tasks, and
    LimitError for more than ``most`` texts.
    """
    value = object_of(body)
    wanted = value.get("encoding_format")
    if wanted not in (None, *FORMATS):
        raise DataError(f"field 'encoding_format' is not supported with this value; expected {' or '.join(FORMATS)}")
    delta = model_of(value, find, EMBEDDING)
    unit = delta.task.normalize
    options = Options(normalize=unit, unit=unit, dimensions=_dimensions(value.get("dimensions")))
    requests = [
        Request(delta.name, {"text": text}, where=f"input[{index}]", version=delta.version)
        for index, text in enumerate(texts_of(value.get("input"), "input", most))
    ]
    return EmbeddingsCall(delta, requests, options, wanted == "base64")


def write_embeddings(call: EmbeddingsCall, predictions: Sequence[Prediction], receipt: Receipt) -> bytes:
    """The vectors in the order of the texts."""
    data = []
    for index, prediction in enumerate(predictions):
        vector: Any = embedding(prediction, call.options)
        if call.base64:
            vector = base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    rest = encode({"model": call.delta.name, "usage": receipt.usage})
    return b'{"object":"list","data":' + encode_list(data) + b"," + rest[1:]


def describe(delta: Delta, started: int, ready: bool) -> dict[str, Any]:
    """A delta as a model; ``started`` stands for the date of making, which a delta does not know.

    ``name`` and ``ready`` are what the first protocol of KServe asks the same route for.
    """
    return {"id": delta.name, "object": "model", "created": started, "owned_by": OWNER, "root": delta.name,
            "parent": None if delta.name == "base" else "base", "name": delta.name, "ready": ready}  # fmt: skip


def model_of(value: dict[str, Any], find: Callable[[str], Delta], *tasks: str) -> Delta:
    """The delta that ``model`` names. DataError, NotFound; Unsupported where it does none of those tasks."""
    name = value.get("model")
    if not isinstance(name, str) or not name:
        raise DataError(f"field 'model' is {shown(name)}; expected the name of a delta")
    delta = find(name)
    if delta.task.kind not in tasks:
        raise Unsupported(
            f"delta {delta.name!r} does {delta.task.kind}, not {' or '.join(tasks)}; POST /models/{delta.name}"
        )
    return delta


def texts_of(value: Any, field: str, most: float) -> list[str]:
    """A text, or a list of at most so many, as a list; DataError, LimitError, and Unsupported for token ids."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise DataError(f"field {field!r} is {shown(value)}; expected a text or a list of texts")
    check_items(len(texts), most)
    for text in texts:
        if isinstance(text, int | list) and not isinstance(text, bool):
            raise Unsupported(f"field {field!r} holds token ids, which belong to another tokenizer; send texts")
        if not isinstance(text, str):
            raise DataError(f"field {field!r} holds {shown(text)}; expected texts")
    return texts


def _dimensions(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise DataError(f"field 'dimensions' is {shown(value)}; expected an integer from 1")
    return value
