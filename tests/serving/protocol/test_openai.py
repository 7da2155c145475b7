"""With OpenAI's own client over a real socket, and every bad body."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import openai
import pytest

from bertology_serve.serving.keys import Key, Keyring, digest_of
from tests.serving.conftest import DELTAS
from tests.serving.running import Running, running

TEXTS = ["the cat was good", "a dog", "a very cold river bank"]


@pytest.fixture(scope="module")
def client(server) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def alone(server: Running, name: str, text: str) -> list[float]:
    vector: list[float] = server.post("/predict", {"delta": name, "text": text}).json()["embedding"]
    return vector


@pytest.mark.parametrize("name", ["sense", "raw", "base"])
@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}])
def test_embeddings(client, server, name, options):
    """Without options the client asks for base64."""
    answer = client.embeddings.create(model=name, input=TEXTS, **options)
    assert answer.model == name
    assert [item.index for item in answer.data] == [0, 1, 2]
    for text, item in zip(TEXTS, answer.data, strict=True):
        assert item.embedding == pytest.approx(alone(server, name, text), abs=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 6 + 4 + 7


def test_one_text_and_fewer_dimensions(client, server):
    (one,) = client.embeddings.create(model="sense", input=TEXTS[0]).data
    (short,) = client.embeddings.create(model="sense", input=TEXTS[0], dimensions=8, user="somebody").data
    whole = np.array(one.embedding[:8])
    assert short.embedding == pytest.approx(whole / np.linalg.norm(whole), abs=1e-6)
    (raw,) = client.embeddings.create(model="raw", input=TEXTS[0], dimensions=8).data
    assert raw.embedding == pytest.approx(alone(server, "raw", TEXTS[0])[:8], abs=1e-6)


def test_models(client):
    models = {model.id: model for model in client.models.list()}
    assert models.keys() == {"base", *DELTAS}
    assert (models["mood"].object, models["mood"].owned_by) == ("model", "bertology-serve")
    assert (models["mood"].parent, models["base"].parent) == ("base", None)
    assert client.models.retrieve("mood") == models["mood"]


def test_the_client_s_errors(client):
    with pytest.raises(openai.NotFoundError, match="no delta 'moot'"):
        client.embeddings.create(model="moot", input="cat")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("moot")
    with pytest.raises(openai.BadRequestError, match="does classification, not embedding; POST /models/mood"):
        client.embeddings.create(model="mood", input="cat")
    with pytest.raises(openai.BadRequestError, match="token ids"):
        client.embeddings.create(model="sense", input=[1, 2, 3])


def test_the_client_s_key(pipeline):
    ring = Keyring([Key("some", digest_of("some-key-of-the-tests", ""), deltas=("sense",), tokens_per_second=10.0)])
    with running(pipeline, ring) as server:
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="some-key-of-the-tests", max_retries=0) as known:
            assert [model.id for model in known.models.list()] == ["sense"]
            assert known.embeddings.create(model="sense", input=TEXTS).data
            with pytest.raises(openai.PermissionDeniedError):
                known.embeddings.create(model="raw", input="cat")
            with pytest.raises(openai.RateLimitError, match="10 tokens a second"):
                known.embeddings.create(model="sense", input=TEXTS)
        with (
            openai.OpenAI(base_url=url, api_key="another-key-of-tests", max_retries=0) as other,
            pytest.raises(openai.AuthenticationError),
        ):
            other.models.list()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ([], 400, "expected an object"),
        ({"input": "cat"}, 400, "field 'model' is null"),
        ({"model": "sense"}, 400, "field 'input' is null"),
        ({"model": "sense", "input": []}, 400, "expected a text or a list of texts"),
        ({"model": "sense", "input": [None]}, 400, "holds null"),
        ({"model": "sense", "input": [True]}, 400, "holds a boolean"),
        ({"model": "sense", "input": ["cat", ""]}, 400, "input[1]: field 'text' is empty"),
        ({"model": "sense", "input": "cat", "encoding_format": "int8"}, 400, "has no ranges for int8"),
        ({"model": "sense", "input": "cat", "encoding_format": []}, 400, "expected float, base64, int8"),
        ({"model": "sense", "input": "cat", "dimensions": 0}, 400, "expected an integer from 1"),
        ({"model": "sense", "input": "cat", "dimensions": True}, 400, "expected an integer from 1"),
        ({"model": "sense", "input": "cat", "dimensions": 99}, 400, "the embedding has 32"),
        ({"model": "../sense", "input": "cat"}, 404, "no delta"),
    ],
)
def test_bad_bodies(server, body, status, message):
    response: httpx.Response = server.post("/v1/embeddings", body)
    assert response.status_code == status, response.text
    assert message in response.text
