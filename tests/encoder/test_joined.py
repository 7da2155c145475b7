"""Query, key and value laid out as one linear."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bertology_serve.encoder import linear
from bertology_serve.kinds.slots import KEY, QUERY, VALUE
from tests import tiny
from tests.encoder.test_mixed import logits, pipeline, requests


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v3", "deberta-own", "mpnet"])
def test_same_answers_and_weights(family: str, tmp_path: Path) -> None:
    made = pipeline(tiny.encoder(family, tmp_path))
    encoder = made.encoder
    jobs = [made.prepare(request) for request in requests()]
    before = made.run(jobs)
    weights = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    assert linear.join(encoder.model, encoder.anatomy)
    for one, other in zip(before, made.run(jobs), strict=True):
        assert (logits(one.as_dict()) - logits(other.as_dict())).abs().max() <= 1e-5, one.delta
    after = encoder.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


def test_members_share_one_tensor_until_they_part(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    members = [encoder.model.get_submodule(str(encoder.anatomy.slot(name).paths[0])) for name in (QUERY, KEY, VALUE)]
    assert linear.join(encoder.model, encoder.anatomy)
    assert len({member.weight.untyped_storage().data_ptr() for member in members}) == 1
    encoder.unpack_weights()
    assert len({member.weight.untyped_storage().data_ptr() for member in members}) == 3
    assert all(member.joined is None for member in members)


def test_packed_and_trained_projections_stay_as_they_are(tmp_path: Path) -> None:
    packed = tiny.encoder("modernbert", tmp_path / "packed")
    assert not linear.join(packed.model, packed.anatomy)
    trained = tiny.encoder("bert", tmp_path / "trained")
    trained.model.requires_grad_(True)
    assert not linear.join(trained.model, trained.anatomy)
