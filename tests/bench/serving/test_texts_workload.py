from __future__ import annotations

from collections import Counter

import pytest

from bertology_serve.bench.serving.texts_workload import Workload, lengths, owners, texts
from bertology_serve.errors import SpecError


def test_lengths_have_the_promised_mean_and_maximum():
    found = lengths(Workload())
    assert len(found) == 64
    assert max(found) == 128
    assert min(found) == 3
    assert sum(found) / 64 == pytest.approx(24, abs=0.5)


def test_the_seed_changes_the_order_only():
    one, other = lengths(Workload(seed=0)), lengths(Workload(seed=1))
    assert one != other
    assert sorted(one) == sorted(other)


def test_every_delta_has_its_share():
    counts = Counter(owners(Workload()))
    assert sorted(counts) == list(range(8))
    assert set(counts.values()) == {8}


def test_texts_have_exactly_those_tokens(encoder):
    work = Workload(16, 4, mean=10.0, longest=32)
    assert [len(encoder.tokenizer(text).input_ids) for text in texts(work, encoder.tokenizer)] == lengths(work)


def test_real_texts_have_exactly_those_tokens_too(encoder):
    work, lines = Workload(16, 4, mean=10.0, longest=32), ["the cat was unbelievably good", "a dog in the house ."]
    found = texts(work, encoder.tokenizer, lines)
    assert [len(encoder.tokenizer(text).input_ids) for text in found] == lengths(work)
    assert {word for text in found for word in text.split()} <= {word for line in lines for word in line.split()}
    assert found == texts(work, encoder.tokenizer, lines)


@pytest.mark.parametrize("options", [{"deltas": 0}, {"deltas": 65}, {"mean": 3.0}, {"mean": 200.0}])
def test_nonsense_is_refused(options):
    with pytest.raises(SpecError):
        Workload(**options)
