"""The Dockerfile, the compose file and Kubernetes' files say only what the commands know. Nothing is built here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bertology_serve.cli.main import main
from bertology_serve.scale.config import checked_addresses
from bertology_serve.serving.http.gate import PUBLIC

ROOT = Path(__file__).parents[2]


def known_options(capsys) -> set[str]:
    assert main(["serve", "--help-all"]) == 0
    return set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


def test_options_are_those_of_serve(capsys):
    known = known_options(capsys)
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    given = [json.loads(line.split(" ", 1)[1]) for line in lines if line.startswith(("ENTRYPOINT", "CMD"))]
    composed = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["serve"]
    words = {word for part in (*given, composed["command"]) for word in part if word.startswith("--")}
    assert len(words) >= 8
    assert words <= known
    assert given[0][:2] == ["bertology-serve", "serve"]


def test_the_grace_is_longer_than_the_drain():
    composed = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["serve"]
    told = dict(zip(composed["command"][::2], composed["command"][1::2], strict=True))
    grace = int(composed["stop_grace_period"].removesuffix("s"))
    assert grace > float(told["--drain-seconds"]) + float(told["--shutdown-seconds"])


def test_the_container_is_not_root_and_its_files_are_not_writable():
    assert "USER server" in (ROOT / "Dockerfile").read_text()
    composed = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["serve"]
    assert composed["read_only"]
    assert all(volume.endswith(":ro") for volume in composed["volumes"])


def kubernetes() -> list[dict[str, Any]]:
    folder = ROOT / "deploy" / "kubernetes"
    named = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*named, "kustomization.yaml"])
    return [part for name in named for part in yaml.safe_load_all((folder / name).read_text())]


def containers() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for part in kubernetes():
        if part["kind"] in ("StatefulSet", "Deployment"):
            pod = part["spec"]["template"]["spec"]
            yield pod, pod["containers"][0]


def test_kubernetes_options_are_those_of_the_commands(capsys):
    known = {"serve": known_options(capsys)}
    assert main(["route", "--help-all"]) == 0
    known["route"] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    found = {container["name"]: (pod, container) for pod, container in containers()}
    assert found.keys() == known.keys()
    for name, (pod, container) in found.items():
        told = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
        assert told.keys() <= known[name]
        wait = float(told["--drain-seconds"]) + float(told["--shutdown-seconds"])
        assert pod["terminationGracePeriodSeconds"] > wait
        assert {probe["httpGet"]["path"] for key, probe in container.items() if key.endswith("Probe")} <= PUBLIC
        for secret in (one["valueFrom"]["secretKeyRef"] for one in container["env"] if "valueFrom" in one):
            assert f"--from-literal={secret['key']}=" in (ROOT / "deploy/kubernetes/serve.yaml").read_text()
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert f"--uid {pod['securityContext']['runAsUser']} " in (ROOT / "Dockerfile").read_text()


def test_the_router_knows_every_pod():
    [servers] = [part for part in kubernetes() if part["kind"] == "StatefulSet"]
    [routed] = [container["args"] for _, container in containers() if container["name"] == "route"]
    name, service = servers["metadata"]["name"], servers["spec"]["serviceName"]
    pods = [f"http://{name}-{number}.{service}:8000" for number in range(servers["spec"]["replicas"])]
    assert checked_addresses(routed[routed.index("--replicas") + 1].split(","), "--replicas") == tuple(pods)
    assert next(part for part in kubernetes() if part["kind"] == "Service")["metadata"]["name"] == service


@pytest.mark.skipif(
    shutil.which("kubernetes-validate") is None, reason="pip install kubernetes-validate (108 MB of schemas)"
)
def test_kubernetes_takes_them():
    files = sorted(str(path) for path in (ROOT / "deploy/kubernetes").glob("[rs]*.yaml"))
    done = subprocess.run(["kubernetes-validate", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
