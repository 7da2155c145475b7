from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import SpecError
from tests import tiny
from tests.training.live import trainer


def top(encoder: Encoder, layers: int):
    return trainer(encoder, method="top-k", options={"top-k": {"layers": layers}}, epochs=1, learning_rate=1e-2)


def test_only_the_upper_layers_and_the_head_move(bert: Encoder):
    before = {name: tensor.clone() for name, tensor in bert.model.state_dict().items()}
    one = top(bert, 1)
    head = one.live.head.own_tensors()
    one.run()
    for name, tensor in bert.model.state_dict().items():
        upper = name.startswith("encoder.layer.2.")
        still = "key.bias" in name  # softmax does not see it: its gradient is rounding
        assert torch.equal(tensor, before[name]) != upper or still, name
    assert all(not torch.equal(tensor, head[name]) for name, tensor in one.live.head.own_tensors().items())


@pytest.mark.parametrize("layers", [1, 2])
def test_no_graph_below_the_lowest_trained_layer(bert: Encoder, layers: int):
    one = top(bert, layers)
    seen: list[bool] = []
    for path in bert.anatomy.layer_paths:
        bert.model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    one.live.train()
    one.live([encoding for item in one.items for encoding in item.encodings])
    assert seen == [False] * (3 - layers + 1) + [True] * (layers - 1)


def test_more_layers_than_there_are_is_refused(bert: Encoder):
    with pytest.raises(SpecError, match=r"to train 4 layers, but .* has 3; lower --top-k"):
        top(bert, 4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_are_found_in_every_family(tmp_path: Path, family: str):
    encoder = tiny.encoder(family, tmp_path)
    paths = encoder.anatomy.layer_paths
    assert len(paths) == encoder.anatomy.layers
    for path, query in zip(paths, encoder.anatomy.slot("query").paths, strict=True):
        assert query.startswith(path + ".")
        assert path.rpartition(".")[2].isdigit()
