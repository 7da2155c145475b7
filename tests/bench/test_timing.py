from __future__ import annotations

import torch

from bertology_serve.bench.serving.peft_contenders import Contender
from bertology_serve.bench.timing import WARM_UP, Timed, interleave, ratio


def test_contenders_take_turns_and_none_always_follows_another():
    calls: list[str] = []

    def contender(name: str) -> Contender:
        return Contender(name, lambda: calls.append(name) or torch.zeros(1))

    rounds = []
    times = interleave([contender(name) for name in "abc"], 9, lambda: rounds.append(1))
    assert "".join(calls).startswith("a" * WARM_UP + "b" * WARM_UP + "c" * WARM_UP)
    orders = ["".join(calls[at : at + 3]) for at in range(3 * WARM_UP, len(calls), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len({order.partition("c")[0][-1:] for order in orders}) == 3  # before c came nothing, a, b
    assert [(timed.name, len(timed.seconds), len(timed.cpu_seconds)) for timed in times] == [(n, 9, 9) for n in "abc"]
    assert len(rounds) == 9


def test_ratios_are_taken_within_rounds():
    slow = Timed("slow", (2.0, 40.0, 2.0), (1.0, 1.0, 1.0))
    fast = Timed("fast", (1.0, 10.0, 1.0), (2.0, 2.0, 2.0))
    assert ratio(slow, fast) == 2.0
    assert ratio(slow, fast, cpu=True) == 0.5
    assert slow.median == 2.0
