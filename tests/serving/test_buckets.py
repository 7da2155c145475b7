from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertology_serve.serving.keys import Bucket


def test_a_burst_then_the_average():
    bucket = Bucket(rate=2.0, burst=4.0)
    assert [bucket.take(1, 0.0) for _ in range(4)] == [0.0] * 4
    assert bucket.take(1, 0.0) == 0.5
    assert bucket.take(1, 0.25) == 0.25
    assert bucket.take(1, 0.5) == 0.0


def test_what_is_larger_than_the_bucket_passes_when_it_is_full_and_is_paid_for_later():
    bucket = Bucket(rate=10.0)
    assert bucket.take(35, 0.0) == 0.0
    assert bucket.take(1, 0.0) == pytest.approx(2.6)
    assert bucket.take(35, 0.0) == pytest.approx(3.5)
    assert bucket.take(1, 2.6) == 0.0


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 20)), max_size=60), st.integers(1, 20), st.integers(1, 40))
def test_the_average_is_never_exceeded_and_waiting_as_told_is_enough(calls, rate, burst):
    bucket, now, taken, largest = Bucket(rate, burst), 0.0, 0, 0
    for pause, amount in calls:
        now += pause
        wait = bucket.take(amount, now)
        if wait:
            now += wait
            assert bucket.take(amount, now) == 0.0
        taken, largest = taken + amount, max(largest, amount)
        assert taken <= burst + rate * now + max(0, largest - burst) + 1e-6
