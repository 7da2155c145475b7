from __future__ import annotations

import torch

from bertology_serve.export.bench.timing import WARM_UP, Timed, interleave, ratio
from bertology_serve.serving.bench.contenders import Contender


def test_contenders_take_turns_and_none_is_always_first():
    calls: list[str] = []

    def contender(name: str) -> Contender:
        return Contender(name, lambda: calls.append(name) or torch.zeros(1))

    rounds = []
    times = interleave([contender("a"), contender("b")], 3, lambda: rounds.append(1))
    assert "".join(calls) == "a" * WARM_UP + "b" * WARM_UP + "ab" + "ba" + "ab"
    assert [(timed.name, len(timed.seconds), len(timed.cpu_seconds)) for timed in times] == [("a", 3, 3), ("b", 3, 3)]
    assert len(rounds) == 3


def test_ratios_are_taken_within_rounds():
    slow = Timed("slow", (2.0, 40.0, 2.0), (1.0, 1.0, 1.0))
    fast = Timed("fast", (1.0, 10.0, 1.0), (2.0, 2.0, 2.0))
    assert ratio(slow, fast) == 2.0
    assert ratio(slow, fast, cpu=True) == 0.5
    assert slow.median == 2.0
