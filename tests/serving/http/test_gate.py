"""Keys, rights and rates over a real socket."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bertology_serve.serving.http.gate import PUBLIC
from bertology_serve.serving.keys import Key, Keyring, digest_of
from bertology_serve.serving.server import TOLD_HEADERS
from tests.serving.conftest import DELTAS
from tests.serving.running import Running, running

PLAIN = {name: f"{name}-0123456789abcdef" for name in ("admin", "all", "some", "slow", "thrifty", "spent")}
FIELDS = {
    "admin": {"admin": True},
    "some": {"deltas": ("mood", "gr*", "gone")},
    "slow": {"calls_per_second": 0.5, "burst_seconds": 4.0},
    "thrifty": {"tokens_per_second": 4.0},
    "spent": {"tokens_per_second": 1e-6},
}


def keyring() -> Keyring:
    return Keyring([Key(name, digest_of(plain, name), **FIELDS.get(name, {})) for name, plain in PLAIN.items()])


@pytest.fixture(scope="module")
def guarded(pipeline) -> Iterator[Running]:
    with running(pipeline, keyring=keyring(), max_header_bytes=2000) as started:
        yield started


def call(server: Running, name: str | None, method: str, path: str, body=None) -> httpx.Response:
    headers = {} if name is None else {"Authorization": f"Bearer {PLAIN[name]}"}
    return server.client.request(method, path, json=body, headers=headers)


def test_every_route_but_health_needs_a_key(guarded):
    """Read from the application itself, so that a new route is closed unless this list says otherwise."""
    assert {"/health", "/v2/health/live", "/v2/health/ready"} == PUBLIC
    for route in guarded.server.config.app.routes:
        path = route.path.replace("{delta}", "mood").replace("{version}", "1")
        for method in route.methods:
            status = call(guarded, None, method, path).status_code
            assert status == (200 if route.path in PUBLIC else 401), (method, path)
            wrong = guarded.client.request(method, path, headers={"X-API-Key": "wrong-wrong-wrong-wrong"})
            assert wrong.status_code == status


def test_paths_that_are_not_there_tell_strangers_nothing(guarded):
    response = call(guarded, None, "GET", "/nothing")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"].startswith("no valid API key")
    assert call(guarded, "all", "GET", "/nothing").status_code == 404


def test_a_key_without_limits_asks_anything(guarded):
    item = {"delta": "mood", "text": "the cat"}
    assert call(guarded, "all", "POST", "/predict", item).status_code == 200
    assert guarded.client.post("/predict", json=item, headers={"X-API-Key": PLAIN["all"]}).status_code == 200
    assert call(guarded, "all", "GET", "/metrics").status_code == 200


INFER = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["cat"]}]}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/predict", {"delta": "sense", "text": "cat"}),
        ("POST", "/predict", [{"delta": "mood", "text": "cat"}, {"delta": "sense", "text": "cat"}]),
        ("POST", "/predict", {"delta": "nothing-like-it", "text": "cat"}),
        ("POST", "/models/sense", {"inputs": "cat"}),
        ("GET", "/models/sense", None),
        ("GET", "/models/sense/health", None),
        ("POST", "/v2/models/sense/infer", INFER),
        ("POST", "/v1/models/sense:predict", {"instances": ["cat"]}),
        ("POST", "/v1/rerank", {"model": "sense", "query": "cat", "documents": ["dog"]}),
        ("POST", "/score", {"model": "sense", "text_1": "cat", "text_2": "dog"}),
        ("GET", "/v2/models/sense/config", None),
        ("POST", "/v2/models/mood/infer", {**INFER, "parameters": {"deltas": ["sense"]}}),
        ("GET", "/v2/models/sense", None),
        ("GET", "/v2/models/sense/versions/1", None),
        ("GET", "/v2/models/sense/ready", None),
        ("POST", "/tei/sense/tokenize", {"inputs": "cat"}),
        ("POST", "/tei/sense/decode", {"ids": [7]}),
        ("POST", "/tokenize", {"inputs": "cat", "model": "sense"}),
        ("GET", "/metrics", None),
    ],
)
def test_a_key_opens_its_own_deltas_only(guarded, method, path, body):
    response = call(guarded, "some", method, path, body)
    assert response.status_code == 403
    assert call(guarded, "all", method, path, body).status_code == (404 if "nothing" in str(body) else 200)


def test_a_key_learns_no_other_names(guarded):
    assert call(guarded, "some", "POST", "/predict", {"delta": "mood", "text": "cat"}).status_code == 200
    assert [model["name"] for model in call(guarded, "some", "GET", "/models").json()] == ["grade", "mood"]
    assert call(guarded, "some", "GET", "/v2/models").json() == {"models": ["grade", "mood"]}
    assert call(guarded, "some", "GET", "/").json()["deltas"] == 2
    for response in (
        call(guarded, "some", "POST", "/predict", {"delta": "gone", "text": "cat"}),
        call(guarded, "some", "POST", "/models/gone", {"inputs": "cat"}),
        call(guarded, "some", "POST", "/v2/models/gone/infer", INFER),
    ):
        assert response.status_code == 404
        assert not [name for name in DELTAS.keys() - {"mood", "grade"} if name in response.text]


def test_too_many_calls_are_429_with_retry_after(guarded):
    assert [call(guarded, "slow", "GET", "/v2").status_code for _ in range(2)] == [200, 200]
    response = call(guarded, "slow", "GET", "/v2")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert "0.5 calls a second" in response.json()["error"]
    assert call(guarded, "all", "GET", "/v2").status_code == 200


def test_too_many_tokens_are_429_and_never_queued(guarded):
    item = {"delta": "mood", "text": "the cat was good"}
    assert call(guarded, "thrifty", "POST", "/predict", item).status_code == 200
    response = call(guarded, "thrifty", "POST", "/predict", item)
    assert response.status_code == 429
    assert 1 <= int(response.headers["retry-after"]) <= 2
    assert guarded.server.service.queue.items == 0


ITEM = {"delta": "mood", "text": "cat"}
# How a call of each route that takes items holds so many of them
ITEMS: dict[str, Callable[[int], Any]] = {
    "/predict": lambda n: [ITEM] * n,
    "/models/{delta}": lambda n: {"inputs": ["cat"] * n},
    "/v2/models/{delta}/infer": lambda n: {
        "inputs": [{"name": "text", "shape": [n], "datatype": "BYTES", "data": ["cat"] * n}]
    },
    "/v1/models/{delta}:predict": lambda n: {"instances": ["cat"] * n},
    "/v1/embeddings": lambda n: {"model": "sense", "input": ["cat"] * n},
    "/v1/rerank": lambda n: {"model": "grade", "query": "cat", "documents": ["dog"] * n},
    "/v2/rerank": lambda n: {"model": "grade", "query": "cat", "documents": ["dog"] * n},
    "/v2/embed": lambda n: {"model": "sense", "texts": ["cat"] * n},
    "/score": lambda n: {"model": "grade", "text_1": "cat", "text_2": ["dog"] * n},
    "/classify": lambda n: {"model": "mood", "input": ["cat"] * n},
    "/embed": lambda n: {"model": "sense", "inputs": ["cat"] * n},
    "/embed_sparse": lambda n: {"model": "words", "inputs": ["cat"] * n},
    "/embed_all": lambda n: {"model": "sense", "inputs": ["cat"] * n},
    "/rerank": lambda n: {"model": "grade", "query": "cat", "texts": ["dog"] * n},
    "/similarity": lambda n: {"inputs": {"source_sentence": "cat", "sentences": ["dog"] * (n - 1)}},
    "/tei/{delta}/predict": lambda n: {"inputs": [["cat"]] * n},
}
ITEMS["/v2/models/{delta}/versions/{version}/infer"] = ITEMS["/v2/models/{delta}/infer"]
for name in ("embed", "embed_sparse", "embed_all", "rerank", "similarity"):
    ITEMS[f"/tei/{{delta}}/{name}"] = ITEMS[f"/{name}"]
NO_ITEMS = ("/v2/repository/", "tokenize", "decode")


def test_every_route_is_bounded_in_bytes_items_and_rates(pipeline):
    """Read from the application itself, so that no route comes without its bounds."""
    with running(pipeline, keyring=keyring(), max_items=3, max_body_bytes=2000) as server:
        call(server, "spent", "POST", "/predict", ITEM)
        posts = [route.path for route in server.server.config.app.routes if "POST" in route.methods]
        assert {path for path in posts if not any(part in path for part in NO_ITEMS)} == ITEMS.keys()
        deltas = {
            "embed": "sense",
            "similarity": "sense",
            "rerank": "grade",
            "embed_sparse": "words",
            "embed_all": "late",
        }
        deltas = {f"/tei/{{delta}}/{name}": delta for name, delta in deltas.items()}
        for template in posts:
            path = template.replace("{delta}", deltas.get(template, "mood")).replace("{version}", "1")
            key = "admin" if "repository" in path else "all"
            assert call(server, key, "POST", path, "x" * 2000).status_code == 413, path
            if template in ITEMS:
                answers = [call(server, "all", "POST", path, ITEMS[template](count)) for count in (3, 4)]
                assert [answer.status_code for answer in answers] == [200, 413], (path, answers[0].text)
                refused = call(server, "spent", "POST", path, ITEMS[template](3))
                assert refused.status_code == 429, path
                assert "tokens a second" in refused.text


@pytest.mark.parametrize(("sent", "kept"), [("call-7/a:b", True), ("x" * 129, False), ("a b", False), ("", False)])
def test_a_call_keeps_its_id_or_gets_one(guarded, sent, kept):
    """In answers of every kind, refusals too."""
    found = set()
    for name, path in (
        ("all", "/v2"),
        ("all", "/nothing"),
        (None, "/v2"),
        ("some", "/models/sense"),
        (None, "/health"),
    ):
        headers = {"X-Request-Id": sent} | ({"X-API-Key": PLAIN[name]} if name else {})
        found.add(guarded.client.get(path, headers=headers).headers["x-request-id"])
    if kept:
        assert found == {sent}
    else:
        assert len(found) == 5
        assert all(re.fullmatch("[0-9a-f]{32}", one) for one in found)


def test_no_key_reaches_the_log_or_an_answer(guarded, caplog):
    caplog.set_level("DEBUG")
    for name in PLAIN:
        response = call(guarded, name, "POST", "/predict", {"delta": "moot", "text": "cat"})
        assert PLAIN[name] not in response.text
    assert not [plain for plain in PLAIN.values() if plain in caplog.text]


def test_heads_over_the_limit(guarded):
    response = guarded.client.get("/health", headers={"X-Long": "x" * 2000})
    assert response.status_code == 431
    assert "at most 2000 are taken" in response.json()["error"]
    assert guarded.client.get("/health?" + "x" * 2000).status_code == 431


def test_the_names_of_headers_count_as_their_values_do(guarded):
    names = {f"X-{number}-{'n' * 900}": "" for number in range(2)}
    assert guarded.client.get("/health", headers=dict(list(names.items())[:1])).status_code == 200
    response = guarded.client.get("/health", headers={**names, "X-More": "x" * 150})
    assert response.status_code == 431
    assert int(response.json()["error"].split("hold ")[1].split()[0]) > 2000


@pytest.mark.parametrize("piece", [b"X-Long: " + b"x" * 500, b"X-Many: x\r\n" * 50])
def test_a_head_that_never_ends_is_cut_off(guarded, piece):
    url = httpx.URL(guarded.url)
    with socket.create_connection((url.host, url.port), timeout=120) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        sent, pieces = 0, piece * 100
        with contextlib.suppress(OSError):
            while sent < 10**8:  # the answer is sent after 2,000 bytes; then a few bodies' worth may come
                client.sendall(pieces)
                sent += len(pieces)
        assert sent < 10**8
        answer = b""
        with contextlib.suppress(OSError):  # it may have closed while we were still sending
            answer = client.recv(1000)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")
    assert guarded.client.get("/health").status_code == 200


def slowly(server: Running, data: bytes, patience: float = 10) -> bytes:
    """What comes back of a connection that sends this and no more."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=patience) as client:
        client.sendall(data)
        with contextlib.suppress(OSError):
            return client.recv(10_000)
    return b"reset"


def test_heads_and_bodies_that_come_too_slowly(pipeline):
    with running(pipeline, max_body_seconds=0.2) as server:
        assert slowly(server, b"") in (b"", b"reset")
        assert slowly(server, b"POST /predict HTTP/1.1\r\nHost: x\r\n") in (b"", b"reset")
        answer = slowly(server, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer
        assert b"the body was not there after 0.2 s" in answer
        with socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port), timeout=120) as client:
            for _ in range(2):  # a connection that has answered may rest, and goes on
                client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(10_000).startswith(b"HTTP/1.1 200")
                time.sleep(0.3)


def test_calls_are_logged_without_texts(pipeline, caplog):
    caplog.set_level("INFO")
    with running(pipeline, log_calls=True) as server:
        answer = server.post("/predict?secret=1", {"delta": "mood", "text": "SECRET"})
        server.client.get("/nothing%0aINFO%20forged")
    calls = [record.call for record in caplog.records if hasattr(record, "call")]
    assert [(one["method"], one["path"], one["status"], one["key"]) for one in calls] == [
        ("POST", "/predict", 200, "everyone"),
        ("GET", "/nothing%0aINFO%20forged", 404, "everyone"),
    ]
    assert calls[0]["ms"] > 0
    assert calls[0]["request_id"] == answer.headers["x-request-id"] != calls[1]["request_id"]
    own = [record.getMessage() for record in caplog.records if record.name.startswith("bertology")]
    assert "secret" not in " ".join(own).lower()


ORIGIN = "https://app.example"
PROTOCOLS = Path(__file__).parents[3] / "docs" / "reference" / "protocols.md"


def test_browsers_may_call_where_that_is_allowed_and_nowhere_else(server, pipeline):
    ring = Keyring([Key("all", digest_of("all-0123456789abcdef", ""))])
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    assert server.client.options("/predict", headers=asked).status_code == 405
    assert not [name for name in server.client.get("/v2", headers=asked).headers if name.startswith("access-control")]
    with running(pipeline, ring, cors_origin=(ORIGIN,)) as opened:
        preflight = opened.client.options("/predict", headers=asked)  # without a key, as browsers send it
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert "x-api-key" in preflight.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in preflight.headers
        refused = opened.client.get("/v2", headers={"Origin": ORIGIN})  # pages can read why
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
        told = opened.client.get("/v2", headers={"Origin": ORIGIN, "X-API-Key": "all-0123456789abcdef"})
        assert told.status_code == 200
        exposed = told.headers["access-control-expose-headers"].split(", ")
        assert exposed == ["X-Request-Id", "X-Truncated", "Retry-After", "Inference-Header-Content-Length"]
        for headers in ({**asked, "Origin": "https://evil.example"}, {**asked, "Origin": f"{ORIGIN}.evil"}):
            assert "access-control-allow-origin" not in opened.client.options("/predict", headers=headers).headers
        assert opened.client.options("/predict").status_code == 401


def test_pages_may_read_every_header_that_the_protocols_name():
    named = set(re.findall(r"`(X-[A-Za-z-]+)`", PROTOCOLS.read_text()))
    assert named == {"X-Request-Id", "X-Truncated"}
    assert named < set(TOLD_HEADERS)


BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


def test_browsers_get_a_page_that_tells_strangers_nothing(guarded, server):
    page, same = (one.client.get("/", headers=BROWSER) for one in (guarded, server))
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert page.text == same.text, "the page is the same for everybody: it asks for what it shows, with a key"
    assert not any(name in page.text for name in ("mood", guarded.server.service.registry.pipeline.encoder.name))
    assert guarded.client.head("/", headers=BROWSER).status_code == 200
    for method, path in (("GET", "/models"), ("GET", "/openapi.json"), ("POST", "/"), ("GET", "/metrics")):
        assert guarded.client.request(method, path, headers=BROWSER).status_code == 401
    assert guarded.client.get("/", headers={"Accept": "application/json, text/html"}).status_code == 401


def test_the_page_runs_its_own_script_and_loads_nothing_from_elsewhere(server):
    page = server.client.get("/", headers=BROWSER)
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"https?://|\bsrc=|innerHTML|\bstyle=|\bon\w+=", page.text)
    assert page.headers["vary"] == "Accept"
    assert "html" not in server.client.get("/").headers["content-type"]


BROWSED = """
const fs = require("fs"), html = fs.readFileSync(0, "utf8"), [base, key] = process.argv.slice(1);
class Element {
  constructor(tag) { Object.assign(this, { tag, children: [], listeners: {}, value: "", own: "" }) }
  get textContent() { return this.own + this.children.map(one => one.textContent ?? one).join("") }
  set textContent(text) { this.own = text; this.children = [] }
  append(...more) { this.children.push(...more) }
  replaceChildren(...more) {
    this.textContent = ""; this.children = more;
    if (this.id === "delta") this.value = more[0].textContent;
  }
  addEventListener(name, act) { this.listeners[name] = act }
  querySelectorAll(tag) {
    return this.children.flatMap(one => one instanceof Element ? [one, ...one.querySelectorAll(tag)] : [])
      .filter(one => one.tag === tag);
  }
}
const known = {}, whole = new Element("main"), real = fetch;
for (const [, tag, id] of html.matchAll(/<(\\w+)[^>]* id="(\\w+)"/g))
  known[id] = Object.assign(new Element(tag), { id });
globalThis.document = { getElementById: id => known[id], createElement: tag => new Element(tag),
                        querySelector: () => whole, querySelectorAll: () => [] };
let last = Promise.resolve();
globalThis.fetch = (path, options) => last = real(base + path, options);
const settled = async () => { await last; await new Promise(done => setTimeout(done, 50)) };
eval(html.match(/<script>([^]*?)<\\/script>/)[1].replace('"use strict";', ""));
(async () => {
  await settled();
  const before = { gate: !known.gate.hidden, main: !whole.hidden, told: known.problem.textContent };
  if (key) { known.key.value = key; known.gate.listeners.submit({ preventDefault() {} }); await settled() }
  const answers = {};
  for (const { textContent: name } of known.delta.children) {
    known.delta.value = name;
    known.delta.listeners.change();
    for (const box of known.fields.querySelectorAll("textarea")) box.value = box.textContent;
    await known.ask.listeners.submit({ preventDefault() {} });
    answers[name] = [known.answer.textContent, known.call.textContent];
  }
  const rows = known.deltas.children.map(row => row.children.map(cell => cell.textContent));
  console.log(JSON.stringify({ before, answers, rows }));
})();
"""
"""The page's script in Node, with as much of a document as it needs: every delta is asked what stands in its boxes."""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("key", ["", PLAIN["all"]])
def test_the_page_asks_every_task(guarded, server, key):
    started = guarded if key else server
    page = started.client.get("/", headers=BROWSER).text
    run = subprocess.run(
        ["node", "-e", BROWSED, started.url.rstrip("/"), key], input=page, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["before"] == {"gate": bool(key), "main": not key, "told": ""}
    assert [row[0] for row in found["rows"]] == [*sorted(DELTAS), "base"]
    for name, (answer, call) in found["answers"].items():
        assert json.loads(call.split("\n\n", 1)[1])["delta"] == name, call
        assert answer
