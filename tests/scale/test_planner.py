from __future__ import annotations

import json

import pytest

from bertology_serve.config_fields import nested
from bertology_serve.errors import FormatError, NotFound, SpecError
from bertology_serve.scale import planner as planning
from bertology_serve.scale.config import PlanConfig
from bertology_serve.scale.planner import Planner, draw, read_calibration
from bertology_serve.scale.simulation import ReplicaCosts

KNOWN = ReplicaCosts(((10, 100, 0.004), (1000, 10_000, 0.103)), 0.0005, load_seconds=0.01, delta_bytes=1000)


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "LEAST", 3000)


def planner(**options: object) -> Planner:
    given = {"deltas": 100, "calls": 1500.0, "mean_tokens": 20.0, **options}
    return Planner(nested(PlanConfig, given, "the plan has no option"), KNOWN)


def test_the_fewest_replicas_that_meet_the_targets() -> None:
    one = planner(p99_ms=40.0, replica_cost=0.5)
    chosen = one.plan()
    assert chosen.missed == ()
    assert (chosen.p99_ms <= 40, chosen.hit_rate >= 0.95, chosen.cost_per_hour) == (True, True, 0.5 * chosen.replicas)
    assert chosen.cost_per_million == pytest.approx(chosen.cost_per_hour / (1500 * 3600) * 1e6)
    fewer = [trial for trial in one.trials if trial.replicas < chosen.replicas]
    assert max(trial.replicas for trial in fewer) == chosen.replicas - 1
    assert all(trial.missed for trial in fewer)
    assert planner(p99_ms=40.0, calls=3000.0).plan().replicas > chosen.replicas


def test_memory_is_what_the_hit_rate_needs() -> None:
    little, much = (planner(hit_rate=rate, p99_ms=200.0).plan() for rate in (0.7, 0.97))
    assert little.device_mb < much.device_mb
    assert 0.7 <= little.hit_rate < 0.95
    assert much.resident_deltas <= 100


def test_what_is_given_is_not_looked_for() -> None:
    one = planner(replicas=2, device_mb=0.01, p99_ms=1000.0)
    chosen = one.plan()
    assert one.trials == [chosen]
    assert (chosen.replicas, chosen.device_mb, "hit_rate" in chosen.missed) == (2, 0.01, True)
    assert one.config.traffic.rate == planner(calls=None, tokens=30_000.0).config.traffic.rate


def test_targets_that_no_call_can_meet() -> None:
    with pytest.raises(SpecError, match=r"p99_ms is 1; a call of 67 tokens takes [0-9.]+ ms alone"):
        planner(p99_ms=1.0).plan()
    with pytest.raises(SpecError, match=r"3 replicas, each busy \d+% of the time, miss p99_ms"):
        planner(p99_ms=15.0, most_replicas=3).plan()


@pytest.mark.parametrize(
    "options", [{"tokens": 5.0}, {"calls": None}, {"ranks": ()}, {"zipf": -1.0}, {"deltas": 0}, {"hit_rate": 1.0}]
)
def test_plans_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="expected"):
        planner(**options)


@pytest.mark.parametrize("text", ["{", "[]", '{"ladder": [[1, 2]]}', '{"ladder": []}', "[" * 100_000])
def test_files_that_are_no_calibration(text: str, tmp_path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(NotFound, match="bench serving --calibration"):
        read_calibration(path)
    path.write_text(text)
    with pytest.raises(FormatError, match="is no calibration"):
        read_calibration(path)


def test_files_and_the_picture(tmp_path) -> None:
    one = planner(replicas=1)
    chosen = one.plan()
    found = json.loads(json.dumps(planning.as_dict(one, chosen, 1.0)))
    assert found["plan"] == found["trials"][0]
    path = tmp_path / "again.json"
    path.write_text(json.dumps(found["calibration"]))
    assert read_calibration(path) == KNOWN
    draw(one.trials, one.config.targets, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
