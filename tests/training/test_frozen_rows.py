from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bertology_serve.encoder.bank import LiveBank
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import lowest_trained
from bertology_serve.errors import SpecError
from bertology_serve.training.frozen_rows import FrozenPrefixCache, below, features, pooled
from bertology_serve.training.method_options import EVERYWHERE, KINDS
from bertology_serve.training.run_directory import Destination
from bertology_serve.training.train import Prepared, prepare, train
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import Trainer
from tests import tiny
from tests.training import live as lives
from tests.training import sets

ALL = (0, 1, 2, 3)


def ready(encoder: Encoder, **values: str) -> Prepared:
    config = TrainConfig.of("classification", recipe="lp", max_length=32, **values)  # type: ignore[arg-type]
    return prepare(config, encoder, sets.source("classification"))


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("max_tokens", [7, 4096])
def test_rows_are_huggingface_s_hidden_states_pooled(bert_path: Path, bert: Encoder, pooling: str, max_tokens: int):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(bert_path).eval()
    made = ready(bert, pooling=pooling)
    found = pooled(made.live, made.items, ALL, max_tokens)
    for i, item in enumerate(made.items):
        encoding = item.encodings[0]
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor([encoding.ids]),
                token_type_ids=torch.tensor([encoding.types]),
                output_hidden_states=True,
            )
        for layer in ALL:
            rows = out.hidden_states[layer][0]
            own: Tensor = {"mean": rows.mean(0), "cls": rows[0], "max": rows.amax(0)}[pooling]
            assert torch.allclose(found[layer][i], own, atol=1e-5), (layer, i)
    assert not torch.allclose(found[1], found[2], atol=1e-2)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_has_layers(tmp_path: Path, family: str):
    encoder = tiny.encoder(family, tmp_path)
    made = ready(encoder)
    depth = encoder.anatomy.layers
    found = pooled(made.live, made.items, range(depth + 1), 64)
    assert list(found) == list(range(depth + 1))
    assert all(not torch.equal(found[layer], found[layer + 1]) for layer in range(depth))
    alone = pooled(made.live, made.items[:1], (depth,), 64)[depth]
    assert torch.allclose(alone, found[depth][:1], atol=1e-4)


def test_a_second_call_runs_nothing(tmp_path: Path, bert: Encoder, monkeypatch: pytest.MonkeyPatch):
    made = ready(bert)
    first = features(made.live, made.items, ALL, 4096, tmp_path / "kept")
    monkeypatch.setattr(Encoder, "layers", None)
    second = features(made.live, made.items, ALL, 4096, tmp_path / "kept")
    assert all(torch.equal(first[layer], second[layer]) for layer in ALL)
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".safetensors"]


def test_what_the_rows_depend_on_is_in_the_name(tmp_path: Path, bert: Encoder, bert_path: Path):
    made = ready(bert)
    changed = Encoder.load(str(bert_path))
    changed.ref = replace(changed.ref, sha256="of other weights")
    features(made.live, made.items, (3,), 4096, tmp_path)
    features(made.live, made.items[1:], (3,), 4096, tmp_path)
    features(made.live, made.items, (2,), 4096, tmp_path)
    features(made.live, made.items, (3,), 64, tmp_path)
    features(ready(bert, pooling="cls").live, made.items, (3,), 4096, tmp_path)
    features(ready(changed).live, made.items, (3,), 4096, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    features(made.live, made.items, (3,), 4096, tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_a_damaged_file_is_made_anew(tmp_path: Path, bert: Encoder):
    made = ready(bert)
    first = features(made.live, made.items, (3,), 4096, tmp_path)
    path = next(tmp_path.iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    again = features(made.live, made.items, (3,), 4096, tmp_path)
    assert torch.equal(first[3], again[3])
    assert path.read_bytes() == whole


UPPER: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "options": {"lora": {"layers": (2,)}}},
    "adapter": {"method": "adapter", "options": {"adapter": {"drop_lowest": 2}}},
    "biases": {"method": "bitfit,norms", "layers": "2"},
    "top-k": {"method": "top-k", "options": {"top-k": {"layers": 1}}, "trunk_dropout": False},
}


def trainer(encoder: Encoder, folder: Path | None, task: str, **values: Any) -> Trainer:
    # a large epsilon: Adam would make noise in the last bits of tiny gradients as large as a step
    one = lives.trainer(encoder, task, epochs=3, learning_rate=5e-3, epsilon=1e-4, **values)
    if folder is not None:
        one.live.around = FrozenPrefixCache(one.live, one.items, 60, folder).over
    return one


class Calls:
    """Counts the passes through each layer."""

    def __init__(self, encoder: Encoder) -> None:
        self.counts = [0] * encoder.anatomy.layers
        for number, path in enumerate(encoder.anatomy.layer_paths):
            module = encoder.model.get_submodule(path)
            norm = next(child for child in module.modules() if isinstance(child, torch.nn.LayerNorm))
            norm.register_forward_hook(lambda *_, number=number: self.count(number))

    def count(self, number: int) -> None:
        self.counts[number] += 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", UPPER)
def test_training_on_kept_rows_is_training(tmp_path: Path, family: str, method: str):
    path = tiny.save(family, tmp_path / "encoder")
    plain = trainer(Encoder.load(path), None, "classification", **UPPER[method])
    kept = trainer(Encoder.load(path), tmp_path / "kept", "classification", **UPPER[method])
    calls = Calls(kept.live.encoder)
    start = {name: parameter.detach().clone() for name, parameter in kept.parameters.items()}
    plain.run()
    kept.run()
    assert calls.counts[:2] == [0, 0]
    assert calls.counts[2] == kept.total
    for name, parameter in kept.parameters.items():
        assert (parameter - plain.parameters[name]).abs().max() < 1e-5, name
    assert any((parameter - start[name]).abs().max() > 1e-3 for name, parameter in kept.parameters.items())


def test_several_sequences_an_item(bert: Encoder, tmp_path: Path):
    values = {"options": {"lora": {"layers": (1, 2)}}, "max_length": 24}
    plain = trainer(bert, None, "question-answering", **values)
    kept = trainer(bert, tmp_path, "question-answering", **values)
    kept.live.eval()
    plain.live.eval()
    assert kept.gradient(kept.items) == pytest.approx(plain.gradient(plain.items), rel=1e-5)


def test_unknown_sequences_take_the_whole_way(bert: Encoder, tmp_path: Path):
    one = trainer(bert, None, "classification", **UPPER["lora"])
    one.live.eval()
    expected = one.gradient(one.items)
    one.live.around = FrozenPrefixCache(one.live, one.items[:3], 60, tmp_path).over
    calls = Calls(bert)
    assert one.gradient(one.items) == expected
    assert min(calls.counts) > 0


def test_rows_lie_where_the_next_run_finds_them(bert: Encoder, tmp_path: Path):
    one = trainer(bert, tmp_path, "classification", **UPPER["lora"])
    (file,) = tmp_path.iterdir()
    calls = Calls(bert)
    again = trainer(bert, tmp_path, "classification", **UPPER["adapter"])
    assert calls.counts == [1, 1, 1]  # one sequence, to see what a layer gives
    assert list(tmp_path.iterdir()) == [file]
    assert again.live.around.__self__.rows.shape == one.live.around.__self__.rows.shape
    trainer(bert, tmp_path, "classification", options={"lora": {"layers": (1,)}})
    assert len(list(tmp_path.iterdir())) == 2


def test_rows_are_those_of_the_layer(bert: Encoder, tmp_path: Path):
    one = trainer(bert, None, "classification", **UPPER["lora"])
    encodings = [encoding for item in one.items[:4] for encoding in item.encodings]
    rows, batch = below(one.live, encodings, bert.anatomy.layer_paths[2])
    with torch.no_grad():
        expected = bert.layers(batch, LiveBank([("live", one.live.effects())]))[2]
    assert torch.equal(rows, expected)


@pytest.mark.parametrize(
    ("values", "lowest"),
    [
        (UPPER["lora"], 2),
        (UPPER["adapter"], 2),
        (UPPER["top-k"], 2),
        ({"method": "lora,adapter", "options": {"adapter": {"drop_lowest": 1}, "lora": {"layers": (2,)}}}, 1),
        ({"method": "lora,bitfit", "options": {"lora": {"layers": (2,)}}}, 0),
        ({"method": "lora,bitfit", "layers": "top:1", "options": {"lora": {"layers": (1, 2)}}}, 1),
        *(({"method": kind, "layers": "top:2"}, 1) for kind in KINDS if kind not in EVERYWHERE),
        ({"method": "ia3,adapter", "layers": "2"}, 2),
        ({"method": "full"}, 0),
        ({"method": "prompt"}, 0),
        ({"method": "probe"}, 3),
    ],
)
def test_no_graph_is_built_below_the_lowest_trained_layer(bert: Encoder, values: dict[str, Any], lowest: int):
    one = lives.trainer(bert, **values)
    assert lowest_trained(one.live) == lowest
    recorded: dict[int, bool] = {}
    for number, path in enumerate(bert.anatomy.layer_paths):
        module = bert.model.get_submodule(path)
        module.register_forward_hook(lambda _, __, out, number=number: recorded.update({number: out.requires_grad}))
    hidden, _ = one.live.hidden([encoding for item in one.items for encoding in item.encodings])
    assert [number for number, graph in recorded.items() if graph] == list(range(lowest, 3))
    assert hidden.requires_grad == (lowest < 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "lora"}, "the lowest is changed"),
        ({"method": "full"}, "the lowest is changed"),
        ({"method": "probe"}, "only the head is"),
    ],
)
def test_nothing_to_keep_is_said(bert: Encoder, tmp_path: Path, values: dict[str, Any], message: str):
    with pytest.raises(SpecError, match=message):
        trainer(bert, tmp_path, "classification", **values)


def test_padded_rows_are_not_kept(bert: Encoder, tmp_path: Path):
    bert.packs = False
    with pytest.raises(SpecError, match="bert is padded"):
        trainer(bert, tmp_path, "classification", **UPPER["lora"])


def test_a_run_with_kept_rows_is_published(bert: Encoder, tmp_path: Path):
    config = TrainConfig.of("classification", max_length=32, epochs=1, trunk_cache=True, **UPPER["top-k"])
    source = sets.source("classification")
    made = prepare(config, bert, source)
    assert len(made.items) == 16
    outcome = train(config, bert, source, source, place=Destination(tmp_path / "mood"))
    assert outcome.difference < 1e-5
    assert [path.suffix for path in (tmp_path / ".features").iterdir()] == [".npy"]
