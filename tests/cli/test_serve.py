from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from bertology_serve.bench.prove.cores import descendants
from bertology_serve.cli.main import main
from bertology_serve.deltas import store
from bertology_serve.export.exporting import export_delta
from bertology_serve.serving.http.listening import bind
from bertology_serve.serving.serve import MOST_LISTED, example, listing
from bertology_serve.tasks.classification import Classification
from tests.serving.conftest import DELTAS, RECORDS, deltas, encoder, registry  # noqa: F401 - fixtures
from tests.serving.running import wait

ROOT = Path(__file__).parents[2]


@contextmanager
def serving(
    backbone: str, directory: Path, *options: str, start: Sequence[str] = ("-m", "bertology_serve")
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The command in a process of its own: process, URL, lines that it has printed."""
    command = [sys.executable, *start, "serve", "--backbone", backbone, "--deltas", str(directory)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BERTOLOGY_CACHE": str(directory.parent / "cache")}
    process = subprocess.Popen(
        [*command, "--port", "0", *options], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines: list[str] = []
    try:
        while not any("try: curl" in line for line in lines):
            line = process.stderr.readline()
            assert line, f"the server ended: {lines}"
            lines.append(line)
        url = re.search(r"http://\S+", lines[-1])
        assert url is not None
        address = url[0].removesuffix("/predict")
        yield process, address, lines
    finally:
        process.kill()
        process.communicate()


def test_sigterm_turns_readiness_off_and_answers_what_was_accepted(encoder, deltas):  # noqa: F811
    with serving(encoder.name, deltas, "--drain-seconds", "3") as (process, url, _):
        answers: list[int] = []
        item = {"delta": "mood", "text": "the cat was good"}
        stop = threading.Event()

        def send() -> None:
            with httpx.Client(base_url=url, timeout=120) as client:
                while not stop.is_set():
                    try:
                        answers.append(client.post("/predict", json=[item] * 8).status_code)
                    except httpx.TransportError:  # the socket has closed: the call was not accepted
                        return

        threads = [threading.Thread(target=send) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait(lambda: answers)
        process.send_signal(signal.SIGTERM)
        wait(lambda: httpx.get(f"{url}/v2/health/ready", timeout=120).status_code == 503)
        for thread in threads:
            thread.join(120)
        stop.set()
        assert process.wait(20) == 0
        assert set(answers) <= {200, 503}
        assert answers[0] == 200


def test_the_example_that_is_printed_works_and_exports_answer(encoder, deltas, tmp_path):  # noqa: F811
    delta = store.load(deltas / "mood" / "1", encoder.anatomy, base=encoder.ref)
    export_delta(encoder, delta, tmp_path / "exported", name="exported")
    with serving(encoder.name, deltas, "--engine", "onnx", "--models", str(tmp_path)) as (_, url, lines):
        found = httpx.post(f"{url}/predict", json={"delta": "exported", "text": "the cat was good"}, timeout=120)
        assert found.json()["label"] in delta.task.labels
        command = shlex.split(lines[-1].removeprefix("try: "))
        assert command[0] == "curl"
        response = httpx.post(command[1], content=command[3])
        assert response.status_code == 200, response.text
        assert f"{len(DELTAS) + 1} deltas on" in "".join(lines)
        assert lines[0].startswith("loading ")
        assert {line.split()[0] for line in lines} >= {"mood", "finder", "exported", "docs:"}
        assert ", fp32, packed through modules of our own), ready after" in "".join(lines)


@pytest.mark.parametrize("name", RECORDS)
def test_there_is_an_example_for_every_task(registry, name):  # noqa: F811
    from bertology_serve.encoder.pipeline import Request

    body = json.loads(shlex.split(example("http://x", registry.find(name)))[3])
    registry.pipeline.prepare(Request(body.pop("delta"), body))


def test_the_example_for_a_delta_of_pairs_is_a_pair(registry):  # noqa: F811
    mood = registry.find("mood")
    pairs = replace(mood, task=replace(mood.task, pairs=True))
    body = json.loads(shlex.split(example("http://x", pairs))[3])
    assert Classification(pairs.task).example(body, "x", labelled=False).text_pair


def test_what_is_served_is_listed(registry):  # noqa: F811
    lines = list(listing([registry.find("mood"), registry.find("finder")]))
    assert lines == [
        "delta   version  task                labels",
        "mood    1        classification      bad, good, so-so",
        "finder  1        question-answering",
    ]
    assert list(listing([])) == []
    many = list(listing([registry.find("mood")] * (MOST_LISTED + 1000)))
    assert (len(many), many[-1]) == (MOST_LISTED + 2, "and 1,000 more: GET /models")


def test_the_example_has_a_key_where_keys_are_on(registry):  # noqa: F811
    command = shlex.split(example("http://x", registry.find("mood"), keyed=True))
    assert command[2:4] == ["-H", "Authorization: Bearer $KEY"]


@pytest.mark.parametrize("option", ["--port", "--grpc-port"])
def test_a_taken_port_is_one_line_and_code_2(option, encoder, deltas, capsys):  # noqa: F811
    with bind("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        ports = [] if option == "--port" else ["--port", "0"]
        assert main(["serve", "--backbone", encoder.name, "--deltas", str(deltas), *ports, option, str(port)]) == 2
    assert capsys.readouterr().err == (
        f"loading {encoder.name}\n"
        f"error: port {port} of 127.0.0.1 is taken; stop what listens there or choose another {option}\n"
    )


def test_options_that_make_no_sense(capsys):
    assert main(["serve", "--backbone", "x", "--deltas", "y", "--max-items", "0"]) == 2
    assert "error: max_items is 0" in capsys.readouterr().err


def test_bad_keys_are_said_before_anything_is_loaded(tmp_path, capsys):
    given = ["--deltas", str(tmp_path), "--keys-file", str(tmp_path / "keys.json")]
    assert main(["serve", "--backbone", "x", *given]) == 2
    assert "expected a JSON file of API keys" in capsys.readouterr().err


def test_graphs_are_for_gpus(encoder, deltas, capsys):  # noqa: F811
    command = ["serve", "--backbone", encoder.name, "--deltas", str(deltas), "--port", "0", "--cuda-graphs"]
    assert main([*command, "--device", "cpu"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "error: --cuda-graphs: got float32 on cpu, expected float16 or bfloat16 on cuda"


def test_serving_in_16_bits(encoder, deltas):  # noqa: F811
    with serving(encoder.name, deltas, "--device", "cpu", "--dtype", "bfloat16") as (_, url, _):
        answer = httpx.post(f"{url}/predict", json=[{"delta": "mood", "text": "the cat was good"}], timeout=120)
        assert answer.status_code == 200, answer.text


def test_the_executors_processes_end_with_the_server_however_that_ends(encoder, deltas):  # noqa: F811
    items = [{"delta": name, **record} for name, record in RECORDS.items()]
    count = min(2, len(os.sched_getaffinity(0)))
    how = ["--executor", "process", "--executors", str(count), "--engine", "torch"]
    with serving(encoder.name, deltas, *how) as (process, url, _):
        assert httpx.post(f"{url}/predict", json=items, timeout=120).status_code == 200
        family = descendants(process.pid)
        assert len(family) == 1 + count, "the fork server and the executors"
        process.kill()
        process.wait(10)
        wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))


MOMENT = """
import os, sys
from pathlib import Path
from bertology_serve.cli.main import main
from bertology_serve.serving.batching import warmup
from bertology_serve.serving.execution import engine_choice

bad = Path(sys.argv[1])
os.getloadavg = lambda: (1e9 if bad.exists() else 0.0, 0.0, 0.0)
warmup.LOOKS, warmup.BUSY = 0.05, 1e6  # no timing of this machine decides
engine_choice.race = lambda torch, onnx: (torch(), onnx()) and ((1.0, 2.0) if bad.exists() else (2.0, 1.0))
sys.exit(main(sys.argv[2:]))
"""
"""The command on a machine that is busy, where torch is faster, as long as a file exists, and idle afterwards."""


def test_an_engine_that_a_busy_machine_chose_is_chosen_again(encoder, deltas, tmp_path):  # noqa: F811
    (busy := tmp_path / "busy").touch()
    item = {"delta": "mood", "text": "the cat was good", "logits": True}
    kept = deltas.parent / "cache" / "findings"
    shutil.rmtree(kept, ignore_errors=True)  # what the servers of other tests found on an idle machine
    with serving(encoder.name, deltas, start=("-c", MOMENT, str(busy))) as (process, url, lines):
        before = httpx.post(f"{url}/predict", json=item, timeout=120).json()
        assert "the machine seems busy (load 1000000000.0 on" in "".join(lines)
        assert [line.split("engine: ")[1].split()[0] for line in lines if "engine: " in line] == ["torch"]
        assert not list(kept.glob("*.json")), "what a busy machine gave is not kept"
        busy.unlink()
        wait(lambda: list(kept.glob("*.json")))
        (found,) = kept.glob("*.json")
        assert json.loads(found.read_bytes())["setting"]["engine"] == "onnx"
        assert process.stderr is not None
        assert "engine: onnxruntime" in next(line for line in process.stderr if "engine: " in line)
        after = httpx.post(f"{url}/predict", json=item, timeout=120).json()
        assert np.allclose(before["logits"], after["logits"], atol=1e-4)
    with serving(encoder.name, deltas, start=("-c", MOMENT, str(busy))) as (_, _, lines):
        assert "engine: onnxruntime" in "".join(lines), "the next start begins with it"


READY = """
import json, sys
from bertology_serve.cli.main import main
from bertology_serve.serving.server import Server

Server.run = lambda server, sockets: print(json.dumps(sorted(sys.modules)))
sys.exit(main(sys.argv[1:]))
"""
"""The command up to where it would answer: which modules have been imported."""
TOKENIZER = (
    "import json, sys, torch; from transformers import AutoTokenizer; AutoTokenizer.from_pretrained(sys.argv[1]); "
    "print(json.dumps(sorted(sys.modules)))"
)
UNUSED = {
    "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "scipy",
    "sklearn", "pandas", "accelerate", "transformers.modeling_utils", "transformers.masking_utils",
    "transformers.generation.utils",
}  # fmt: skip
"""Two seconds of imports and 100 MB that no server of BERT needs."""


def test_serve_imports_nothing_that_it_does_not_need(encoder, deltas, tmp_path):  # noqa: F811
    environment = os.environ | {"BERTOLOGY_CACHE": str(tmp_path)}

    def imported(*command: str) -> set[str]:
        run = subprocess.run(
            [sys.executable, "-c", *command], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return set(json.loads(run.stdout))

    served = [READY, "serve", "--backbone", encoder.name, "--deltas", str(deltas), "--port", "0", "--engine"]
    alone = imported(TOKENIZER, encoder.name) & UNUSED  # transformers up to 5.20 has all of it for a tokenizer
    assert imported(*served, "torch") & UNUSED <= alone
    assert "onnx_ir" in imported(*served, "onnx"), "the graph is made"
    assert imported(*served, "onnx") & (UNUSED | {"onnx", "onnx_ir"}) <= alone, "and kept"


def test_servers_behind_ray_need_ray(deltas, monkeypatch, capsys):  # noqa: F811
    monkeypatch.delitem(sys.modules, "bertology_serve.scale.ray_serve", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "--backbone", "minilm", "--deltas", str(deltas), "--ray-replicas", "2"]) == 2
    assert "pip install 'bertology-serve[ray]'" in capsys.readouterr().err
