from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.training.features import features, pooled
from bertology_serve.training.train import Prepared, prepare
from bertology_serve.training.train_config import TrainConfig
from tests import tiny
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
