from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from bertology_serve.bench.prove.traffic import Outcomes, together
from bertology_serve.bench.serving.load import Load, Point, calls, draw, point
from bertology_serve.cli.main import main
from bertology_serve.errors import SpecError
from tests.bench.prove.test_figures import stage  # noqa: F401 - fixture: servers of this process
from tests.serving.conftest import encoder  # noqa: F401 - fixture


def test_the_command(encoder, stage, tmp_path, capsys):  # noqa: F811
    out, png = tmp_path / "load.json", tmp_path / "load.png"
    options = ["--rates", "20,40", "--seconds", "0.5", "--deltas", "7", "--arrivals", "bursty"]
    files = ["--output", str(out), "--plot", str(png)]
    assert main(["bench", "load", "--backbone", encoder.name, *options, *files]) == 0
    assert "offered/s" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [one["offered"] for one in found["points"]] == [20, 40]
    assert all(one["answered"] > 0 and one["broken"] == 0 for one in found["points"])
    assert png.read_bytes().startswith(b"\x89PNG")


def test_deltas_are_asked_as_zipf_has_it():
    ask = calls(Load(deltas=8, zipf=1.0))
    found = Counter(json.loads(ask().split(b"\r\n\r\n")[1])[0]["delta"] for _ in range(4000))
    assert found["d0"] / found["d1"] == pytest.approx(2, rel=0.25)
    assert found["d0"] / found["d3"] == pytest.approx(4, rel=0.3)


def test_bursts_have_their_mean():
    generator = random.Random(0)
    sizes = [together(generator, 8.0) for _ in range(4000)]
    assert min(sizes) == 1
    assert sum(sizes) / len(sizes) == pytest.approx(8, rel=0.1)
    assert together(generator, 1.0) == 1


def test_what_is_told_of_one_rate():
    found = Outcomes(answered=[0.001 * n for n in range(1, 101)], refused=[0.001] * 10, broken=1)
    one = point(50.0, 2.0, found)
    assert (one.offered, one.answered, one.refused, one.broken) == (50, 50, 5, 1)
    assert one.milliseconds["p50_ms"] == pytest.approx(51)
    assert one.milliseconds["p99_ms"] == pytest.approx(100)


def test_a_rate_that_nobody_answered_is_drawn_too(tmp_path):
    times = dict.fromkeys(("p50_ms", "p90_ms", "p99_ms"), float("inf"))
    draw([Point(10, 10, 0, 0, dict.fromkeys(times, 5.0)), Point(20, 0, 20, 0, times)], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize("options", [{"rates": ()}, {"rates": (0.0,)}, {"seconds": 0.0}, {"deltas": 0}, {"zipf": -1.0}])
def test_loads_that_make_no_sense(options):
    with pytest.raises(SpecError):
        Load(**options)


@pytest.mark.parametrize("options", [("--rates", "a"), ("--output", "x.csv"), ("--plot", "x.pdf")])
def test_bad_options(options, capsys):
    assert main(["bench", "load", *options]) == 2
    assert "expected" in capsys.readouterr().err
