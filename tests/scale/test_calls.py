"""Which delta a call asks."""

from __future__ import annotations

import json
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from bertology_serve.scale.calls import PEEKED, delta_of

names = st.sampled_from(["mood", "grade", "x"])


@given(st.lists(names, min_size=1), names)
def test_the_delta_of_a_call(asked, one):
    assert delta_of("/predict", json.dumps({"text": "a", "delta": one}).encode()) == one
    assert delta_of("/v1/embeddings", json.dumps({"model": one, "input": ["a"]}).encode()) == one
    assert delta_of(f"/v2/models/{one}/infer", b"\x00binary") == one
    assert delta_of(f"/v1/models/{one}:predict", b"{}") == one
    items = json.dumps([{"delta": name, "text": "a"} for name in asked]).encode()
    most = Counter(asked).most_common(1)[0][1]
    found = delta_of("/predict", items)
    assert asked.count(found) == most
    assert found == delta_of("/predict", json.dumps([{"delta": name} for name in reversed(asked)]).encode())
    several = {delta_of("/predict", json.dumps({"deltas": order}).encode()) for order in (asked, asked[::-1])}
    assert len(several) == 1


def test_of_a_long_body_the_first_name_counts():
    items = [{"text": 'say \\"delta\\": \\"not this\\"' * 9, "delta": "mood"}, *({"delta": "grade"},) * 9000]
    assert len(json.dumps(items)) > PEEKED
    assert delta_of("/predict", json.dumps(items).encode()) == "mood"
    assert delta_of("/predict", b'"' + b"x" * 2 * PEEKED) is None
    assert delta_of("/predict", b"[" * 2 * PEEKED) is None


@given(st.binary(max_size=40))
def test_what_is_no_call_has_no_delta(body):
    assert delta_of("/v2/models/stats", body) is None or body
    delta_of("/predict", body)
