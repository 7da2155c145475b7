from __future__ import annotations

import re

import pytest

from bertology_serve.serving.http.gate import PUBLIC
from bertology_serve.serving.http.openapi import document
from tests.serving.conftest import RECORDS


def operations():
    return {
        (method.upper(), path): operation
        for path, item in document()["paths"].items()
        for method, operation in item.items()
        if method in ("get", "post")
    }


def test_every_route_is_documented_and_nothing_else(server):
    app = server.server.config.app
    routes = {(method, route.path) for route in app.routes for method in route.methods - {"HEAD"}}
    assert routes == set(operations())


def test_every_operation_has_a_name_of_its_own():
    names = [operation["operationId"] for operation in operations().values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z][a-z0-9_]+", name) for name in names)
    assert document()["servers"][0]["url"] == "/"


def test_references_lead_somewhere():
    text = repr(document())
    named = set(re.findall(r"#/components/schemas/(\w+)", text))
    assert named <= document()["components"]["schemas"].keys()
    assert {"ItemBody", "Answer", "TaskBody", "InferRequest", "Problem"} <= named


@pytest.mark.parametrize("name", RECORDS)
def test_answers_have_only_documented_fields(server, name):
    known = document()["components"]["schemas"]["Answer"]["properties"].keys()
    answer = server.post("/predict", {"delta": name, "logits": True, **RECORDS[name]}).json()
    assert answer.keys() <= known
    assert RECORDS[name].keys() <= document()["components"]["schemas"]["ItemBody"]["properties"].keys()


def test_each_operation_names_its_answers():
    for (method, path), operation in operations().items():
        codes = set(operation["responses"])
        assert "200" in codes
        if "repository" in path:
            assert codes == {"200", "400", "401", "403", "404", "408", "413", "429", "431", "500"}, path
        elif method == "POST":
            assert codes == {"200", "400", "401", "403", "404", "408", "413", "429", "431", "500", "503", "504"}, path
        elif "{delta}" in path:
            assert "404" in codes, path


def test_only_health_needs_no_key():
    public = {path for (_, path), operation in operations().items() if operation.get("security") == []}
    assert public == PUBLIC
    assert document()["security"] == [{"bearer": []}, {"apiKey": []}]


def test_the_server_gives_the_document(server):
    assert server.client.get("/openapi.json").json() == document()
