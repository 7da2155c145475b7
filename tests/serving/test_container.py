"""The Dockerfile, the compose file and Kubernetes' files say only what the commands know. Nothing is built here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from bertology_serve.cli.main import main
from bertology_serve.scale.config import checked_addresses
from bertology_serve.serving.batching.queue import BatchTimes, WorkQueue
from bertology_serve.serving.batching.scheduler import FairScheduler
from bertology_serve.serving.http.gate import PUBLIC
from bertology_serve.serving.observability.metrics import Metrics
from bertology_serve.serving.versions.desired import Desired, parse_desired

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


KUBERNETES = ROOT / "deploy" / "kubernetes"
APART = ("monitoring.yaml", "gateway.yaml", "kserve.yaml", "llm-d.yaml")  # for those who have what reads them


def parts(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def kubernetes() -> list[dict[str, Any]]:
    return [
        part
        for name in yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
        for part in parts(name)
    ]


def test_every_file_for_kubernetes_is_named():
    text = (KUBERNETES / "kustomization.yaml").read_text()
    named = set(yaml.safe_load(text)["resources"])
    assert named.isdisjoint(APART)
    assert {path.name for path in KUBERNETES.iterdir()} == {*named, *APART, "kustomization.yaml"}
    assert set(re.findall(r"# - (\S+)", text)) == {"monitoring.yaml", "gateway.yaml"}


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


def one(kind: str, name: str | None = None) -> dict[str, Any]:
    """The part of that kind."""
    everything = [*kubernetes(), *(part for file in APART for part in parts(file))]
    [found] = [part for part in everything if part["kind"] == kind and name in (None, part["metadata"]["name"])]
    return found


def test_the_router_knows_every_pod():
    servers, scaler = one("StatefulSet"), one("HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == servers["metadata"]["name"]
    assert "replicas" not in servers["spec"], "an apply would undo what the autoscaler did"
    [routed] = [container["args"] for _, container in containers() if container["name"] == "route"]
    name, service = servers["metadata"]["name"], servers["spec"]["serviceName"]
    pods = [f"http://{name}-{number}.{service}:8000" for number in range(scaler["maxReplicas"])]
    assert checked_addresses(routed[routed.index("--replicas") + 1].split(","), "--replicas") == tuple(pods)
    assert one("Service", service)["spec"]["publishNotReadyAddresses"]


def test_what_kubernetes_reads_is_there():
    """Names of labels, ports, secrets and metrics that one file says of another, or of the server."""
    servers, router = one("StatefulSet"), one("Deployment")
    labels = [part["spec"]["template"]["metadata"]["labels"] for part in (servers, router)]
    monitored = one("PodMonitor")["spec"]
    [wanted] = monitored["selector"]["matchExpressions"]
    assert [label[wanted["key"]] for label in labels] == wanted["values"]
    ports = [{port["name"] for port in container["ports"]} for _, container in containers()]
    assert all(monitored["podMetricsEndpoints"][0]["port"] in names for names in ports)
    pool, told = one("InferencePool")["spec"], router["spec"]["template"]["spec"]["containers"][0]["args"]
    assert pool["selector"]["matchLabels"] == labels[0] == one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
    asked = {port["port"] for port in one("Service", pool["endpointPickerRef"]["name"])["spec"]["ports"]}
    assert pool["endpointPickerRef"]["port"]["number"] in asked
    assert told[told.index("--ext-proc-port") + 1] == str(pool["endpointPickerRef"]["port"]["number"])
    files = one("ConfigMap")["data"]
    [pod, *_] = (pod for pod, _ in containers())
    args = pod["containers"][0]["args"]
    folder, file = args[args.index("--state-file") + 1].rsplit("/", 1)
    assert {"name": "state", "mountPath": folder, "readOnly": True} in pod["containers"][0]["volumeMounts"]
    assert parse_desired(files[file].encode(), file) == Desired()
    metrics = Metrics()
    metrics.watch(WorkQueue(FairScheduler(8), BatchTimes(1.0, 8), 8))
    metrics.affinity(list, list, 1)
    shown = {line.split("{")[0].split()[0] for line in metrics.render().decode().splitlines() if line[0] != "#"}
    assert one("HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]["name"] in shown
    picking = parts("llm-d.yaml")[0]
    plugins = {plugin["type"]: plugin.get("parameters", {}) for plugin in picking["plugins"]}
    [engine] = plugins["core-metrics-extractor"]["engineConfigs"]
    assert {value for key, value in engine.items() if key.endswith("Spec") and value} <= shown
    [profile] = picking["schedulingProfiles"]
    assert {plugin["pluginRef"] for plugin in profile["plugins"]} < plugins.keys()


def test_kserve_runs_what_the_command_knows(capsys):
    [container] = one("ServingRuntime")["spec"]["containers"]
    told = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
    assert told.keys() <= known_options(capsys)
    assert container["command"] == ["bertology-serve", "serve"]
    served = one("InferenceService")["spec"]["predictor"]
    assert served["terminationGracePeriodSeconds"] > float(told["--drain-seconds"]) + float(told["--shutdown-seconds"])
    assert served["model"]["modelFormat"]["name"] == one("ServingRuntime")["spec"]["supportedModelFormats"][0]["name"]
    assert told["--port"] == str(container["ports"][0]["containerPort"])
    assert {container[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe")} <= PUBLIC


@pytest.mark.skipif(
    shutil.which("kubernetes-validate") is None, reason="pip install kubernetes-validate (108 MB of schemas)"
)
def test_kubernetes_takes_them():
    files = [str(KUBERNETES / name) for name in ("serve.yaml", "route.yaml")]
    done = subprocess.run(["kubernetes-validate", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" passed ") + done.stderr.count(" passed ") == len(kubernetes())


CRDS = "BERTOLOGY_CRDS"


def closed(schema: Any) -> Any:
    """The schema of a resource, which refuses fields that it does not name, as ``kubectl --validate=strict`` does."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.mark.skipif(
    CRDS not in os.environ, reason=f"{CRDS}: a folder of the CustomResourceDefinitions of what monitoring.yaml, "
    "gateway.yaml and kserve.yaml are for"
)  # fmt: skip
def test_what_extends_kubernetes_takes_them():
    known: dict[tuple[str, str], Any] = {}
    for path in Path(os.environ[CRDS]).glob("*.yaml"):
        for crd in yaml.safe_load_all(path.read_text()):
            for version in crd["spec"]["versions"]:
                api = f"{crd['spec']['group']}/{version['name']}"
                known[api, crd["spec"]["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
    for part in (part for name in APART[:3] for part in parts(name)):
        schema = closed(known[part["apiVersion"], part["kind"]])
        schema["properties"]["metadata"] = {"type": "object"}
        jsonschema_rs.validate(schema, part)
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validate(schema, {**part, "spec": {**part["spec"], "noSuchField": 1}})
