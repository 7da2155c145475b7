from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bertology_serve.deltas import store
from bertology_serve.deltas.delta import BaseRef
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.encoder.pruned import prune
from bertology_serve.errors import BaseMismatch, FormatError, NotFound
from bertology_serve.serving.registry import Registry
from tests import tiny
from tests.serving.conftest import DELTAS


def registry(encoder: Encoder) -> Registry:
    return Registry(Pipeline(encoder))


def test_every_delta_of_a_directory_answers(registry):
    assert [delta.name for delta in registry.all()] == ["base", *sorted(DELTAS)]
    assert registry.find("mood").version == "1"
    assert registry.find("mood", "1") is registry.find("mood")


def test_the_newest_version_answers(encoder, tmp_path):
    specs, task = DELTAS["mood"]
    for version in ("2", "10", "9"):
        delta = tiny.delta(encoder, "mood", specs, task, int(version))
        store.save(delta, tmp_path / "mood" / version, encoder.anatomy, encoder.config.to_dict())
    made = registry(encoder)
    made.load(tmp_path)
    assert made.find("mood").version == "10"


def test_unknown_names_and_versions(registry):
    with pytest.raises(
        NotFound, match=r"no delta 'moot'; did you mean 'mood'\? known: base, .*; GET /models lists them"
    ):
        registry.find("moot")
    with pytest.raises(NotFound, match="delta 'mood' has no version '7' here; it answers with '1'"):
        registry.find("mood", "7")


def test_a_directory_without_deltas(encoder, tmp_path):
    with pytest.raises(NotFound, match="no usable delta in"):
        registry(encoder).load(tmp_path)
    with pytest.raises(NotFound, match="no directory"):
        registry(encoder).load(tmp_path / "nowhere")


@pytest.fixture
def with_strangers(deltas: Path, encoder: Encoder, tmp_path: Path) -> Path:
    """A good delta, one of other weights, a truncated one, and one whose manifest is no JSON."""
    shutil.copytree(deltas / "mood", tmp_path / "mood")
    stranger = replace(store.load(deltas / "grade" / "1"), name="stranger", base=BaseRef("other", "f" * 64, "bert"))
    store.save(stranger, tmp_path / "stranger" / "1", encoder.anatomy, encoder.config.to_dict())
    shutil.copytree(deltas / "names", tmp_path / "names")
    weights = tmp_path / "names" / "1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(deltas / "sense", tmp_path / "sense")
    (tmp_path / "sense" / "1" / "delta.json").write_text("{", encoding="utf-8")
    return tmp_path


def test_bad_deltas_are_left_out_only_when_asked(encoder, with_strangers):
    made = registry(encoder)
    refused = made.load(with_strangers, skip_bad=True)
    assert [delta.name for delta in made.all()] == ["base", "mood"]
    reasons = {one.path.relative_to(with_strangers).parts[0]: one.reason for one in refused}
    assert reasons.keys() == {"stranger", "names", "sense"}
    assert "made for other (weights ffffffffffff)" in reasons["stranger"]
    assert "is not valid JSON" in reasons["sense"]
    with pytest.raises(FormatError, match="is not valid JSON"):
        registry(encoder).load(with_strangers)


def test_another_base_is_refused_by_name_and_hash(encoder, with_strangers):
    with pytest.raises(BaseMismatch, match=f"the encoder is .* \\(weights {encoder.ref.sha256[:12]}\\)"):
        registry(encoder).load(with_strangers / "stranger")


def test_many_names_are_not_repeated_in_a_message(registry, monkeypatch):
    monkeypatch.setattr("bertology_serve.errors.MOST_NAMED", 3)
    with pytest.raises(NotFound) as problem:
        registry.find("x" * 500)
    count = len(registry.all())
    assert str(problem.value) == f"no delta {'x' * 80!r}; known: {count} others; GET /models lists them"


def test_a_pruned_encoder_serves_its_parents_deltas(encoder, tmp_path):
    specs, task = DELTAS["mood"]
    delta = tiny.delta(encoder, "mood", specs, task)
    store.save(delta, tmp_path / "deltas" / "mood" / "1", encoder.anatomy, encoder.config.to_dict())
    layers, neurons = range(encoder.anatomy.layers), tuple(range(0, 48, 2))
    prune(encoder, tuple((layer, 3) for layer in layers), (neurons,) * len(layers), tmp_path / "pruned")
    made = registry(Encoder.load(str(tmp_path / "pruned")))
    made.load(tmp_path / "deltas")
    served = made.find("mood")
    assert served.version == "1"
    assert served.base.sha256 == made.pipeline.encoder.ref.sha256 != encoder.ref.sha256
    (answer,) = made.pipeline.answer([Request("mood", {"text": "the film was good"})])
    assert answer.answer["label"] in task.labels


def test_whole_models_of_huggingface_answer_beside_the_deltas(encoder, deltas, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(encoder.name, num_labels=2).eval()
    model.save_pretrained(tmp_path / "mine")
    AutoTokenizer.from_pretrained(encoder.name).save_pretrained(tmp_path / "mine")
    made = Registry(Pipeline(encoder))
    made.load(deltas)
    assert [found.name for found in made.load_models(tmp_path)] == ["mine"]
    requests = [Request(name, {"text": "the cat was good"}, logits=True) for name in ("mood", "mine")]
    _, answer = made.pipeline.answer(requests)
    with torch.no_grad():
        expected = model(**encoder.tokenizer("the cat was good", return_tensors="pt")).logits[0]
    assert answer.answer["logits"] == pytest.approx(expected.tolist(), abs=1e-5)
    with pytest.raises(NotFound, match="no export in"):
        made.load_models(deltas)


def test_exports_answer_beside_the_deltas(encoder, deltas, tmp_path):
    from bertology_serve.export.exporting import export_delta
    from bertology_serve.export.spec import ExportSpec
    from tests.serving.running import running

    delta = store.load(deltas / "mood" / "1", encoder.anatomy, base=encoder.ref)
    export_delta(encoder, delta, tmp_path / "models" / "exported", ExportSpec(merge=True), name="exported")
    registry = Registry(Pipeline(encoder))
    registry.load(deltas)
    assert [model.name for model in registry.load_models(tmp_path / "models")] == ["exported"]
    item = {"text": "the cat was good", "logits": True}
    with running(registry.pipeline, root=deltas) as server:
        ours, other = server.post("/predict", [{"delta": name, **item} for name in ("mood", "exported")]).json()
        assert (ours["label"], other["delta"], other["version"]) == (other["label"], "exported", "1")
        assert ours["logits"] == pytest.approx(other["logits"], abs=1e-5)
        assert server.client.get("/v2/models/exported").status_code == 200
        assert "exported" in server.client.get("/models").text
