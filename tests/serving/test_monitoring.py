"""Grafana's dashboard and Prometheus' alerts say only what servers measure; each panel draws a loaded server."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.scale.routed import routing
from tests.serving.running import Running, wait

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
SCRAPED = 0.2
"""Seconds between two scrapes."""
TAKEN = {"$__rate_interval": "5s", "$__range": "5s", "$job": ".*", "$instance": ".*"}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    board = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """The title of each panel and an expression of it, as Grafana sends it."""
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in TAKEN.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


def ask(urls: list[str]) -> None:
    """A call for several deltas to each, and one that is refused."""
    items = [{"delta": name, "text": "the cat was good"} for name in ("mood", "names", "base")]
    for url in urls:
        assert httpx.post(f"{url}/predict", json=items, timeout=120).status_code == 200
        assert httpx.post(f"{url}/predict", json=[{"delta": "mood"}], timeout=120).status_code == 400


@pytest.fixture(scope="module")
def loaded(server: Running) -> Iterator[list[str]]:
    """A server and a router in front of it, both asked; their addresses."""
    with routing([server.url]) as routed:
        wait(lambda: routed.ready)
        ask([server.url, routed.url])
        yield [server.url, routed.url]


def test_every_metric_is_one_that_is_measured(loaded: list[str]):
    known = set[str]()
    for url in loaded:
        page = httpx.get(f"{url}/metrics", timeout=120).text
        known |= set(re.findall(r"^# TYPE (\w+)", page, re.MULTILINE)) | set(
            re.findall(r"^(\w+)[ {]", page, re.MULTILINE)
        )
    known |= {"bertology_router_retries_total"}  # has no series before a call was sent twice
    expressions = [expression for _, expression in queries()] + [rule["expr"] for rule in rules()]
    named = {name for expression in expressions for name in re.findall(r"\bbertology_\w+", expression)}
    assert len(named) >= 25
    assert named <= known


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not():
    tests = yaml.safe_load((FOLDER / "alerts.test.yaml").read_text(encoding="utf-8"))["tests"]
    told = [(one["alertname"], "exp_alerts" in one) for test in tests for one in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert {name for name, fires in told if fires} == names
    assert {name for name, fires in told if not fires} == names
    assert all({"summary", "description"} == rule["annotations"].keys() for rule in rules())
    assert {rule["labels"]["severity"] for rule in rules()} == {"page", "ticket"}


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: apt-get install prometheus")
    return found


@pytest.mark.parametrize(
    "command", ["check rules alerts.yaml", "test rules alerts.test.yaml", "check config --syntax-only prometheus.yaml"]
)
def test_promtool_agrees(command: str):
    done = subprocess.run(
        [program("promtool"), *command.split()], cwd=FOLDER, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def prometheus(loaded: list[str], tmp_path: Path) -> Iterator[httpx.Client]:
    """A real one, which has scraped the server and the router."""
    addresses = [url.removeprefix("http://").strip("/") for url in loaded]
    jobs = [
        {"job_name": name, "static_configs": [{"targets": [address]}]}
        for name, address in zip(("bertology", "bertology-router"), addresses, strict=True)
    ]
    config = {"global": {"scrape_interval": f"{SCRAPED * 1000:.0f}ms"}, "scrape_configs": jobs}
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    files = [f"--config.file={tmp_path / 'prometheus.yaml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    command = [program("prometheus"), *files, "--web.listen-address=127.0.0.1:0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        started = next(line for line in process.stderr if 'msg="Listening on"' in line)
        with httpx.Client(base_url=f"http://{started.rpartition('address=')[2].strip()}") as client:
            yield client
    finally:
        process.terminate()
        process.communicate()


def asked(client: httpx.Client, expression: str) -> list[float]:
    """What Prometheus answers now, a number for each series."""
    answer = client.get("/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    return [float(one["value"][1]) for one in answer["data"]["result"]]


def test_no_panel_is_empty(prometheus: httpx.Client, loaded: list[str]):
    """While calls come in: every expression of every panel gives numbers."""
    empty = dict.fromkeys(queries())
    end = time.monotonic() + 60  # only ends what never comes
    while empty and time.monotonic() < end:
        ask(loaded)
        time.sleep(SCRAPED)
        for query in list(empty):
            found = asked(prometheus, query[1])
            if any(map(math.isfinite, found)):  # of a delta that was not asked lately there is no time
                del empty[query]
    assert list(empty) == []
