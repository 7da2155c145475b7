"""The desired-state file: what it may say, and that the server follows it; canaries, shadows, rollbacks."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertology_serve.deltas import store
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import NotFound, SpecError
from bertology_serve.serving.keys import Key, Keyring, digest_of
from bertology_serve.serving.versions.canary import Splits, agree
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.serving.versions.desired import (
    Canary,
    Desired,
    Split,
    Wish,
    parse_desired,
    read_desired,
    write_desired,
)
from tests import tiny
from tests.serving.conftest import DELTAS
from tests.serving.running import Running, running, wait

ADMIN = "an-admin-key-of-the-tests"
ITEM = {"delta": "mood", "text": "the cat was good"}


@pytest.fixture(scope="module")
def root(encoder, tmp_path_factory) -> Path:
    """Four versions of one delta, the last of another task, and a delta beside it."""
    made: Path = tmp_path_factory.mktemp("desired")
    for version, like in (("1", "mood"), ("2", "mood"), ("3", "mood"), ("4", "grade")):
        delta = tiny.delta(encoder, "mood", *DELTAS[like], int(version))
        store.save(delta, made / "mood" / version, encoder.anatomy, encoder.config.to_dict())
    other = tiny.delta(encoder, "grade", *DELTAS["grade"], 9)
    store.save(other, made / "grade" / "1", encoder.anatomy, encoder.config.to_dict())
    return made


@pytest.fixture
def state(tmp_path) -> Path:
    return tmp_path / "state.json"


def write(path: Path, **deltas: Any) -> None:
    """Writes a new state, as a careful writer does: whole, under its name at once."""
    beside = path.with_suffix(".tmp")
    others = deltas.pop("others", "keep")
    beside.write_text(json.dumps({"deltas": deltas, "others": others}))
    os.replace(beside, path)


@pytest.fixture
def served(encoder, root, state) -> Iterator[Running]:
    write(state, mood={"version": "2", "pin": True, "weight": 3})
    registry = Registry(Pipeline(encoder))
    registry.load(root)
    ring = Keyring([Key("admin", digest_of(ADMIN, ""), admin=True)])
    with running(registry.pipeline, ring, root, registry, state_file=state, watch_seconds=0.05) as server:
        server.client.headers["X-API-Key"] = ADMIN
        yield server


def versions(server: Running, calls: int = 40) -> Counter[str]:
    return Counter(server.post("/predict", ITEM).json()["version"] for _ in range(calls))


def test_the_state_holds_before_the_first_call_and_is_followed(served, state):
    registry = served.server.service.registry
    assert versions(served, 3) == {"2": 3}
    assert registry.tiers.pins == {"mood"}
    assert served.server.service.queue._scheduler._weights["mood"] == 3
    write(state, mood={"version": "1"}, others="unload")
    wait(lambda: versions(served, 1) == {"1": 1})
    wait(lambda: {delta.name for delta in registry.all()} == {"base", "mood"})
    assert registry.tiers.pins == set()


def test_a_config_map_of_kubernetes_is_followed(encoder, root, tmp_path):
    """It is a folder of links to a link to a folder, of which the one in the middle is replaced."""

    def put(version: str) -> None:
        folder = tmp_path / f"..{version}"
        folder.mkdir()
        write(folder / "state.json", mood={"version": version})
        (tmp_path / "new").symlink_to(folder.name)
        os.replace(tmp_path / "new", tmp_path / "..data")

    put("1")
    state = tmp_path / "state.json"
    state.symlink_to("..data/state.json")
    registry = Registry(Pipeline(encoder))
    registry.load(root)
    with running(registry.pipeline, None, root, registry, state_file=state, watch_seconds=0.05) as server:
        assert versions(server, 1) == {"1": 1}
        put("2")
        wait(lambda: versions(server, 1) == {"2": 1})


def test_a_canary_takes_its_share_on_every_route_and_a_version_that_is_named_is_kept(served, state):
    write(state, mood={"version": "2", "canary": {"version": "4", "share": 0.5}})
    wait(lambda: served.server.service.registry.splits)
    found = versions(served, 60)
    assert found.keys() == {"2", "4"}
    assert 10 <= found["4"] <= 50
    tensor = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["the cat"]}]}
    seen = set()
    for _ in range(40):
        answer = served.post("/v2/models/mood/infer", tensor).json()
        outputs = {output["name"] for output in answer["outputs"]}
        assert outputs == ({"value"} if answer["model_version"] == "4" else {"label", "score", "scores"})
        seen.add(answer["model_version"])
        assert served.post("/models/mood", {"inputs": "the cat"}).status_code == 200
    assert seen == {"2", "4"}
    for version in ("2", "4"):
        assert served.post(f"/v2/models/mood/versions/{version}/infer", tensor).json()["model_version"] == version
    write(state, mood={"version": "4"})
    wait(lambda: not served.server.service.registry.pipeline._beside)
    assert versions(served, 8) == {"4": 8}


def test_a_shadow_is_asked_and_never_heard(served, state):
    write(state, mood={"version": "2", "shadow": "3"})
    wait(lambda: served.server.service.registry.splits)
    assert versions(served, 10) == {"2": 10}

    def counted() -> float:
        lines = served.client.get("/metrics").text.splitlines()
        own = [line for line in lines if line.startswith('bertology_shadow_items_total{delta="mood"')]
        assert all('version="3"' in line for line in own)
        return sum(float(line.split()[-1]) for line in own)

    wait(lambda: counted() == 10)


def test_rollback_reads_nothing(served, monkeypatch):
    post = served.client.post
    assert post("/v2/repository/models/mood/load", json={"parameters": {"version": "3"}}).status_code == 200
    assert versions(served, 2) == {"3": 2}
    monkeypatch.setattr(Registry, "_read", lambda *_: pytest.fail("it read from disk"))
    assert post("/v2/repository/models/mood/rollback").json()["version"] == "2"
    assert versions(served, 2) == {"2": 2}
    assert post("/v2/repository/models/mood/rollback").json()["version"] == "3"
    assert post("/v2/repository/models/grade/rollback").status_code == 404


def test_what_cannot_be_had_is_told_once_and_the_rest_is_done(served, state, caplog):
    write(state, mood={"version": "9"}, grade={"version": "1", "pin": True})
    wait(lambda: served.server.service.registry.tiers.pins >= {"grade"})
    assert versions(served, 2) == {"2": 2}
    state.write_text("{")
    wait(lambda: "state.json" in caplog.text)
    assert versions(served, 2) == {"2": 2}
    assert caplog.text.count("no version '9'") == 1


def test_a_canary_that_is_not_there(encoder, root):
    registry = Registry(Pipeline(encoder), root)
    registry.put("mood", "2")
    with pytest.raises(NotFound, match="no version '7'"):
        registry.split("mood", Split("7", 0.5))
    assert not registry.splits
    registry.split("mood", Split("1", 1.0, shadow="3"))
    assert registry.splits.version("mood") == "1"
    assert registry.find("mood", "3").version == "3"
    registry.remove("mood")
    assert not registry.splits
    assert registry.pipeline._beside == {}


def test_shares():
    draws = iter([0.0, 0.09, 0.1, 0.9])
    splits = Splits(lambda: next(draws))
    splits.put("a", Split("2", 0.1))
    assert [splits.version("a") for _ in range(4)] == ["2", "2", "", ""]
    assert splits.version("b") == ""
    splits.put("a", Split())
    assert not splits


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"label": "a", "score": 0.9}, {"label": "a", "score": 0.5}, True),
        ({"label": "a"}, {"label": "b"}, False),
        ({"label": "a"}, {"value": 1.0}, False),
        ({"entities": [{"label": "P", "start": 1, "score": 0.1}]}, {"entities": [{"label": "P", "start": 1}]}, True),
        ({"entities": [{"label": "P", "start": 1}]}, {"entities": [{"label": "P", "start": 2}]}, False),
        ({"value": 1.0}, {"value": 1.0001}, True),
        ({"value": 1.0}, {"value": 1.1}, False),
        ({"embedding": [1.0, 0.0]}, {"embedding": [1.0, 0.0]}, True),
        ({"embedding": [1.0, 0.0]}, {"embedding": [1.0]}, False),
    ],
)
def test_whether_two_answers_decide_the_same(one, other, same):
    assert agree(one, other) is same


def test_the_file(state):
    write(state, mood={"version": "2", "canary": {"version": "3", "share": 0.25}, "shadow": "1"})
    wish = Wish("2", canary=Canary("3", 0.25), shadow="1")
    assert read_desired(state) == Desired({"mood": wish})
    assert wish.split == Split("3", 0.25, "1")


def test_a_part_of_what_is_wanted():
    wish = Wish("2")
    both = {"mood": wish, "grade": Wish("1")}
    assert Desired(both).only({"mood", "x"}) == Desired({"mood": wish})
    assert Desired(both, "unload").only({"mood", "x"}) == Desired({"mood": wish, "x": Wish(loaded=False)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "state.json"),
        ("[]", "state.json"),
        ('{"deltas": {"mood": {"weight": 0}}}', "weight is 0"),
        ('{"deltas": {"mood": {"weight": "a"}}}', "state.json"),
        ('{"deltas": {"mood": {"canary": {"version": "1", "share": 2}}}}', "share is 2"),
        ('{"deltas": {"../mood": {}}}', "cannot be used"),
        ('{"deltas": {"mood": {"version": "../1"}}}', "cannot be used"),
        ('{"others": "burn"}', "state.json"),
    ],
)
def test_files_that_make_no_sense(state, content, message):
    state.write_text(content)
    with pytest.raises(SpecError, match=message):
        read_desired(state)


def test_no_file(state):
    with pytest.raises(NotFound, match="cannot read"):
        read_desired(state)


def test_a_call_with_the_desired_state_is_obeyed_at_once(served):
    def post(**state: Any) -> Any:
        return served.post("/v2/repository/state", state)

    answer = post(deltas={"mood": {"version": "3"}, "grade": {"loaded": False}, "lost": {"version": "1"}})
    assert answer.status_code == 200
    assert answer.json()["failed"].keys() == {"lost"}
    assert "lost" in answer.json()["failed"]["lost"]
    assert versions(served, 3) == {"3": 3}
    assert served.post("/predict", ITEM | {"delta": "grade"}).status_code == 404
    assert post(deltas={"mood": {"canary": {"version": "1", "share": 2}}}).status_code == 400
    assert post(deltas={"grade": {}, "mood": {"version": "3"}}).json() == {"failed": {}}
    assert served.post("/predict", ITEM | {"delta": "grade"}).json()["version"] == "1"
    assert post(deltas={"mood": {}}, others="unload").json() == {"failed": {}}
    assert served.post("/predict", ITEM | {"delta": "grade"}).status_code == 404
    del served.client.headers["X-API-Key"]
    assert post(deltas={}).status_code == 401


@given(
    st.dictionaries(
        st.sampled_from(["mood", "a/b", "x"]),
        st.builds(
            Wish,
            version=st.none() | st.sampled_from(["1", "2"]),
            loaded=st.booleans(),
            pin=st.booleans(),
            weight=st.floats(1e-6, 1e6),
            canary=st.none() | st.builds(Canary, st.sampled_from(["3", "4"]), st.floats(0, 1)),
            shadow=st.sampled_from(["", "5"]),
        ),
    ),
    st.sampled_from(["keep", "unload"]),
)
def test_what_is_written_is_read_again(deltas, others):
    desired = Desired({name: wish for name, wish in deltas.items() if "/" not in name}, others)
    assert parse_desired(write_desired(desired), "here") == desired
