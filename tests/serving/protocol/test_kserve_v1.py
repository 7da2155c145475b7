"""KServe's first protocol."""

from __future__ import annotations

import pytest

from tests.serving.conftest import DELTAS, RECORDS


@pytest.mark.parametrize("name", RECORDS)
def test_predictions_are_this_project_s_answers(server, name):
    record = RECORDS[name]
    answer = server.post(f"/v1/models/{name}:predict", {"instances": [record, {**record, "id": "7"}]}).json()
    own = server.post("/predict", {"delta": name, **record}).json()
    assert answer.keys() == {"predictions"}
    first, second = answer["predictions"]
    assert first.keys() == own.keys()
    assert (first["delta"], first["version"]) == (name, own["version"])
    assert second.pop("id") == "7"


def test_texts_and_the_other_name_of_the_field(server):
    for field in ("instances", "inputs"):
        one = server.post("/v1/models/mood:predict", {field: ["the cat was good"]}).json()["predictions"][0]
        assert one["label"] in ("bad", "good", "so-so")
    assert server.post("/v1/models/mood%3Apredict", {"instances": ["cat"]}).status_code == 200


def test_what_is_ready(server):
    assert set(server.client.get("/v1/models").json()["models"]) == {"base", *DELTAS}
    answer = server.client.get("/v1/models/mood").json()
    assert (answer["name"], answer["ready"]) == ("mood", True)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("mood", {}, 400, "field 'instances' is null"),
        ("mood", {"instances": "a"}, 400, "field 'instances' is a text"),
        ("mood", {"instances": []}, 400, "the call holds no items"),
        ("mood", {"instances": ["a", 1]}, 400, "instances[1]: is a number"),
        ("mood", {"inputs": [{"txt": "a"}]}, 400, "inputs[0]: field 'text' is missing"),
        ("moot", {"instances": ["a"]}, 404, "no delta 'moot'"),
    ],
)
def test_what_is_wrong_is_a_text_as_kserve_has_it(server, path, body, status, message):
    response = server.post(f"/v1/models/{path}:predict", body)
    assert response.status_code == status
    assert message in response.json()["error"]
