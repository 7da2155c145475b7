"""The Dockerfile and the compose file say only what the server knows. No container is built here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from bertology_serve.cli.main import main

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
