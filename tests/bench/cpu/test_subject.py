from __future__ import annotations

import numpy as np
import pytest
import torch

from bertology_serve.bench.cpu import subject
from bertology_serve.bench.cpu.contenders import ALONE, LORA8
from bertology_serve.bench.cpu.our_tools import encodings_of
from bertology_serve.bench.cpu.subject import Inputs, key, prepare, random_delta
from bertology_serve.bench.cpu.worker import read
from bertology_serve.deltas import store
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.tasks.spec import EMBEDDING, TaskSpec
from tests.export.cases import encodings


@pytest.mark.usefixtures("small")
def test_workloads_have_the_lengths_that_they_are_called_after(encoder, delta, tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "SHAPES", ((8, 12), (1, 16), (2, 500)))
    found = prepare(encoder, delta, Inputs(encodings((3, 9) * 20, True)), tmp_path, {ALONE}).batches
    assert [[len(one) for one in batch] for batch in found["8x12"].encodings] == [[12] * 8]
    assert found["8x12"].facts == {"sequences": 8, "tokens": 96, "fill": 1.0}
    assert found["2x500"].facts["tokens"] == 2 * encoder.max_tokens  # all that it has positions for
    mixed, ranked = found["64 mixed"], found["64 sorted in 16s"]
    assert [len(batch) for batch in ranked.encodings] == [16] * 4
    assert ranked.facts["tokens"] == mixed.facts["tokens"]
    assert ranked.facts["fill"] > mixed.facts["fill"]
    assert [len(batch) for batch in found["texts as they come"].encodings] == [32, 8]
    assert found["texts as they come"].facts == {"sequences": 40, "tokens": 240, "fill": pytest.approx(2 / 3, abs=1e-3)}
    (beside,), alone = found["neighbours"].encodings, found["alone"].encodings
    assert [one for batch in alone for one in batch] == list(beside)
    assert LORA8 not in found


@pytest.mark.usefixtures("small")
def test_workers_read_what_was_written(encoder, delta, tmp_path):
    made = prepare(encoder, delta, Inputs(), tmp_path, {ALONE, LORA8})
    for name, batches in made.batches.items():
        found = read(made.workload(name))
        assert [one["texts"] for one in found] == list(batches.texts), name
        assert [encodings_of(one) for one in found] == [list(batch) for batch in batches.encodings], name
        assert [encoder.tokenizer(one).input_ids for one in found[0]["texts"]] == [
            row[mask.astype(bool)].tolist()
            for row, mask in zip(found[0]["input_ids"], found[0]["attention_mask"], strict=True)
        ]
    assert {owner for batch in made.batches[LORA8].owners for owner in batch} == {"d0", "d1"}
    for name in ("d0", "d1"):
        assert store.load(tmp_path / "deltas" / LORA8 / name, encoder.anatomy).name == name


def test_random_deltas_change_something(encoder):
    task = TaskSpec(EMBEDDING, head="none", max_length=32)
    one, again, other = (random_delta(encoder, "d", Bitfit(), task, seed) for seed in (0, 0, 1))
    assert all(np.abs(tensor.numpy()).max() > 0 for tensor in one.tensors.values())
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in one.tensors.items())
    assert not any(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_the_key_is_that_of_the_weights(encoder, delta):
    task = TaskSpec(EMBEDDING, head="none", max_length=32)
    one, other = (random_delta(encoder, "d", Bitfit(), task, seed) for seed in (0, 1))
    assert key(one) == key(one)
    assert len({key(one), key(other), key(delta)}) == 3
