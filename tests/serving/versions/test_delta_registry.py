from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bertology_serve.deltas import store
from bertology_serve.deltas.delta import BaseRef
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import prune
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import BaseMismatch, FormatError, NotFound, Unsupported
from bertology_serve.serving.observability.metrics import Metrics
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.serving.versions.lifecycle import Lifecycle
from bertology_serve.serving.versions.watcher import Watcher
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
    with pytest.raises(FormatError, match=r"names/1/adapter_model\.safetensors is truncated"):
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


@pytest.fixture
def roomy(encoder: Encoder, tmp_path: Path) -> Encoder:
    """The encoder, with a tokenizer that gives as many tokens as there are positions, as peft's adapters take them."""
    shutil.copytree(encoder.name, tmp_path / "roomy")
    settings = tmp_path / "roomy" / "tokenizer_config.json"
    longest = {"model_max_length": encoder.anatomy.max_tokens}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | longest))
    return Encoder.load(str(tmp_path / "roomy"))


@pytest.fixture
def of_peft(deltas: Path, tmp_path: Path) -> Path:
    """peft's checkpoints as NAME/VERSION, the versions called alike, one bare, and one that lies elsewhere."""
    root = tmp_path / "adapters"
    for place in ("tenant-a/checkpoint-500", "tenant-b/checkpoint-500", "tenant-b/checkpoint-1000", "tenant-c"):
        shutil.copytree(deltas / "mood" / "1", root / place)
        (root / place / "delta.json").unlink()
    return root


PEFT = {"tenant-a": ["checkpoint-500"], "tenant-b": ["checkpoint-500", "checkpoint-1000"]}


def test_pefts_adapters_have_one_name_everywhere(roomy, of_peft, capsys):
    """At the start, with and without what is bad, for the watcher, in the index, when loaded, and to ``inspect``."""
    from bertology_serve.cli.main import main
    from bertology_serve.encoder.opening import open_delta

    strict, careful = registry(roomy), registry(roomy)
    strict.load(of_peft)
    assert careful.load(of_peft, skip_bad=True) == []
    for made in (strict, careful):
        assert {delta.name: delta.version for delta in made.all()[1:3]} == {
            "tenant-a": "checkpoint-500",
            "tenant-b": "checkpoint-1000",
        }
        assert sorted(made.resident()) == ["tenant-a", "tenant-b", "tenant-c"]
        shelf = {name: [one.version for one in versions] for name, versions in made.shelf().items()}
        assert shelf == PEFT | {"tenant-c": [made.find("tenant-c").version]}
    assert strict.put("tenant-b", "checkpoint-500").version == "checkpoint-500"

    async def watched() -> None:
        life = Lifecycle(careful, Metrics())
        watcher = Watcher(life, 1.0)
        for _ in range(3):
            await watcher.look(await life.shelf())
        index = {(entry.name, entry.version): entry.state for entry in await life.index()}
        assert index["tenant-b", "checkpoint-1000"] == index["tenant-a", "checkpoint-500"] == "READY"
        assert index["tenant-b", "checkpoint-500"] == "UNAVAILABLE"
        life.close()

    asyncio.run(watched())
    assert sorted(careful.resident()) == ["tenant-a", "tenant-b", "tenant-c"]
    first = of_peft / "tenant-a" / "checkpoint-500"
    assert open_delta(first, roomy.name, name="tenant-a")[0].version == "checkpoint-500"
    assert main(["inspect", str(of_peft), "--backbone", roomy.name, "--json"]) == 0
    found = {(one["name"], one["version"]) for one in json.loads(capsys.readouterr().out)}
    assert found == {(name, v) for name, versions in shelf.items() for v in versions}


def test_what_lies_outside_is_served_by_nobody(roomy, deltas, of_peft, tmp_path):
    shutil.copytree(deltas / "grade" / "1", tmp_path / "away" / "grade" / "1")
    (of_peft / "grade").symlink_to(tmp_path / "away" / "grade")
    (of_peft / "tenant-a" / "2").symlink_to(tmp_path / "away" / "grade" / "1")
    made = registry(roomy)
    reasons = [one.reason for one in made.load(of_peft, skip_bad=True)]
    assert len(reasons) == 2
    assert all("points outside" in reason for reason in reasons)
    assert sorted(made.resident()) == ["tenant-a", "tenant-b", "tenant-c"]
    with pytest.raises(FormatError, match="points outside"):
        made.put("grade")


def test_the_message_says_which_adapter_it_was(roomy, of_peft):
    config = of_peft / "tenant-b" / "checkpoint-1000" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(Unsupported, match="tenant-b/checkpoint-1000: "):
        registry(roomy).load(of_peft)


def test_a_renamed_directory_does_not_go_without_a_word(encoder, deltas, tmp_path, caplog):
    root = tmp_path / "deltas"
    shutil.copytree(deltas / "mood" / "1", root / "tone")
    shutil.copytree(deltas / "grade" / "1", root / "renamed" / "1")
    made = registry(encoder)
    (refused,) = made.load(root, skip_bad=True)
    assert refused.reason == f"{root}/renamed/1 holds delta 'grade', not 'renamed'; rename the directory or the delta"
    assert "tone: answers as 'mood', the name in its delta.json" in caplog.text
    (root / "tone").rename(root / "elsewhere")
    caplog.clear()
    made.put("mood")
    assert made.tiers.cards["mood"].path == root / "elsewhere"
    assert "elsewhere: answers as 'mood'" in caplog.text


def test_an_unreadable_directory_is_logged_by_name_once_and_keeps_its_delta(encoder, deltas, tmp_path, caplog):
    root = tmp_path / "deltas"
    shutil.copytree(deltas / "mood" / "1", root / "loose")
    made = registry(encoder)
    made.load(root)
    (root / "loose" / "delta.json").write_text("{")
    caplog.clear()
    assert made.shelf() == made.shelf() == {"loose": [], "mood": []}, "what cannot be read has not gone"
    assert caplog.text.count("loose/delta.json is not valid JSON") == 1
    asked = registry(encoder)
    asked.root = root
    caplog.clear()
    with pytest.raises(NotFound, match="no delta 'mood'"):
        asked.put("mood")
    assert caplog.text.count("loose/delta.json is not valid JSON") == 1, "it might have been that"


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
    from bertology_serve.export.export_spec import ExportSpec
    from bertology_serve.export.exporting import export_delta
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
