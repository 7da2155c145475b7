from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import nested
from bertology_serve.errors import SpecError
from bertology_serve.training.fleet.fleet import check_frozen
from bertology_serve.training.frozen_rows import FrozenPrefixCache
from bertology_serve.training.memory import estimate, saved_bytes
from bertology_serve.training.train_config import TrainConfig
from tests import tiny
from tests.training.live import trainer

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "options": {"lora": {"dropout": 0.3}}},
    "kinds": {"method": "adapter,bitfit,prompt,prefix", "trunk_dropout": True},
    "full": {"method": "full"},
    "mixout": {"method": "mixout"},
    "top-k": {"method": "top-k", "options": {"top-k": {"layers": 2}}},
}


def gradients(encoder: Encoder, **values: Any) -> tuple[float, dict[str, torch.Tensor | None]]:
    """The loss and gradients of one batch, dropout and all, from the same random numbers."""
    made = trainer(encoder, **values)
    torch.manual_seed(1)
    made.live.train()
    with made.regulariser.mixed():
        loss = made.gradient(made.items)
    layers = map(encoder.model.get_submodule, encoder.anatomy.layer_paths)
    assert all("forward" not in vars(layer) for layer in layers)
    return loss, {name: parameter.grad for name, parameter in made.parameters.items()}


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("bert", method) for method in METHODS),
        *((family, "full") for family in ("modernbert", "deberta-v3", "mpnet")),
        ("deberta-v3", "lora"),
    ],
)
def test_gradients_keep_their_bits(tmp_path: Path, family: str, method: str):
    results = []
    for checkpointing in (False, True):
        encoder = tiny.encoder(family, tmp_path)
        results.append(gradients(encoder, checkpointing=checkpointing, **METHODS[method]))
    (loss, plain), (again, checked) = results
    assert loss == again
    assert any(gradient is not None and gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        other = checked[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name


@pytest.mark.parametrize("method", ["full", "lora", "top-k"])
def test_less_is_kept_for_the_backward_pass(bert: Encoder, method: str):
    plain, checked = (
        trainer(bert, **METHODS[method], checkpointing=checkpointing, batch_size=16) for checkpointing in (False, True)
    )
    kept = [saved_bytes(made.live, made.items, held(made)) for made in (plain, checked)]
    assert kept[1] < 0.35 * kept[0]
    needed = [estimate(made).activations for made in (plain, checked)]
    assert needed[0] == kept[0]
    assert kept[1] < needed[1] < 0.75 * kept[0], "one layer at a time comes back"


def held(made: Any) -> set[int]:
    return {p.data_ptr() for p in (*made.live.encoder.model.parameters(), *made.live.parameters())}


def test_it_goes_with_the_cache_of_the_trunk(bert: Encoder, tmp_path: Path):
    found = []
    for checkpointing in (False, True):
        made = trainer(bert, **METHODS["top-k"], checkpointing=checkpointing)
        made.live.around = nested(FrozenPrefixCache(made.live, made.items, 4096, tmp_path).over, made.live.around)
        made.live.eval()
        made.gradient(made.items)
        found.append({name: parameter.grad for name, parameter in made.parameters.items()})
        made.optimizer.zero_grad()
    assert all(gradient is None or torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


@pytest.mark.parametrize("flag", ["checkpointing", "trunk_cache"])
def test_a_fleet_says_that_it_has_none(flag: str):
    with pytest.raises(SpecError, match=f"mood: {flag} is for one run, and a fleet's passes are shared"):
        check_frozen("mood", TrainConfig.of("classification", **{flag: True}))
