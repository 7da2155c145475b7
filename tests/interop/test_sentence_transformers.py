"""LoRA that sentence-transformers saved answers here with its pooling, of its length, with or without norm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import bertology_serve as bs
from bertology_serve.deltas import store
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import read_sentence_task
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import FormatError, Unsupported
from tests import tiny

TEXT = "the cat was very good , not bad"
MODULES = "sentence_transformers.models."
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*", "ignore:.*sentence_transformers.*")


def written(directory: Path, base: Path, pooling: dict[str, Any], *, normalize: bool) -> Any:
    """An adapter in sentence-transformers' layout, as its versions 2 to 5 write it; returns peft's model."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["query"], init_lora_weights=False)
    model = peft.get_peft_model(transformers.AutoModel.from_pretrained(base), config).eval()
    model.save_pretrained(directory)
    listed = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    modules = [{"idx": i, "name": str(i), "path": path, "type": MODULES + kind}
               for i, (path, kind) in enumerate(listed)]  # fmt: skip
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    (directory / "modules.json").write_text(json.dumps(modules))
    return model


def vector(encoder: Encoder, delta: Delta) -> Tensor:
    pipeline = Pipeline(encoder)
    pipeline.add(delta)
    (answer,) = pipeline.answer([Request(delta.name, {"text": TEXT})])
    return torch.tensor(answer.answer["embedding"])


def pooled(rows: Tensor, mode: str) -> Tensor:
    """sentence-transformers' definition, for the rows [T, H] of one text."""
    return {"cls": rows[0], "max": rows.amax(0), "mean": rows.mean(0)}[mode]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("mode", "config"),
    [
        ("cls", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}),
        ("max", {"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True}),
        ("mean", {"pooling_mode_mean_tokens": True}),
        ("cls", {"pooling_mode": "cls", "include_prompt": True}),
        ("max", {"pooling_mode": ["max"]}),
    ],
)
def test_pooling_and_length_are_those_of_the_directory(
    tmp_path: Path, mode: str, config: dict[str, Any], normalize: bool
) -> None:
    encoder = tiny.encoder("bert", tmp_path / "base")
    model = written(tmp_path / "x", tmp_path / "base", config, normalize=normalize).double()
    delta = encoder.read_delta(tmp_path / "x")
    assert (delta.task.pooling, delta.task.normalize) == (mode, normalize)
    with torch.no_grad():
        rows = model(**encoder.tokenizer(TEXT, return_tensors="pt")).last_hidden_state[0]
    expected = pooled(rows, mode)
    expected = expected / expected.norm() if normalize else expected
    assert (vector(encoder, delta).double() - expected).abs().max() < 1e-6 * max(1.0, float(expected.abs().max()))


def test_without_its_list_the_pooling_is_read_all_the_same(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path / "base")
    written(tmp_path / "x", tmp_path / "base", {"pooling_mode_cls_token": True}, normalize=False)
    (tmp_path / "x" / "modules.json").unlink()
    task = encoder.read_delta(tmp_path / "x").task
    assert (task.pooling, task.normalize) == ("cls", False)
    (tmp_path / "x" / "1_Pooling" / "config.json").unlink()
    task = encoder.read_delta(tmp_path / "x").task
    assert (task.pooling, task.normalize) == ("mean", True)  # peft alone says nothing


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pooling by lasttoken is not computed here"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls and mean"),
        ("1_Pooling/config.json", [], "holds a list"),
        ("modules.json", [{"type": "x.Transformer"}, {"type": "x.Pooling"}, {"type": "x.Dense"}], "lists .*Dense"),
        ("modules.json", [{"type": "x.Transformer"}, {"type": "x.Pooling", "path": "/etc"}], "the folder '/etc'"),
        ("modules.json", [{"type": "x.Transformer"}, {"type": "x.Pooling", "path": "../x"}], "the folder '../x'"),
        ("modules.json", [{"type": "x.Transformer"}, {"type": "x.Pooling", "path": "none"}], "the folder 'none'"),
        ("modules.json", {}, "no list of modules"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
        ("config_sentence_transformers.json", {"prompts": ["query: "]}, "'prompts' holds no texts by name"),
        ("config_sentence_transformers.json", {"prompts": {"q": 1}}, "'prompts' holds no texts by name"),
    ],
)
def test_what_is_not_computed_alike_is_refused(tmp_path: Path, file: str, values: Any, message: str) -> None:
    encoder = tiny.encoder("bert", tmp_path / "base")
    written(tmp_path / "x", tmp_path / "base", {"pooling_mode_cls_token": True}, normalize=False)
    (tmp_path / "x" / file).write_text(json.dumps(values))
    with pytest.raises((Unsupported, FormatError), match=message):
        encoder.read_delta(tmp_path / "x")


def test_texts_are_cut_where_the_directory_cuts_them(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path / "base")
    written(tmp_path / "x", tmp_path / "base", {"pooling_mode_cls_token": True}, normalize=False)
    assert encoder.read_delta(tmp_path / "x").task.max_length == encoder.max_tokens
    (tmp_path / "x" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    assert encoder.read_delta(tmp_path / "x").task.max_length == 20
    (tmp_path / "x" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10}))
    assert encoder.read_delta(tmp_path / "x").task.max_length == 10


@pytest.mark.parametrize("mode", ["cls", "max", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_library_itself_gives_the_same(tmp_path: Path, mode: str, normalize: bool) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    models = pytest.importorskip("sentence_transformers.models")
    encoder = tiny.encoder("bert", tmp_path / "base")
    parts = [models.Transformer(str(tmp_path / "base")), models.Pooling(32, pooling_mode=mode)]
    model = library.SentenceTransformer(modules=parts + ([models.Normalize()] if normalize else []), device="cpu")
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
    model.save_pretrained(str(tmp_path / "x"), create_model_card=False)
    delta = store.load(tmp_path / "x", encoder.anatomy, base=encoder.ref, options=encoder.config.to_dict())
    expected = torch.from_numpy(model.encode(TEXT))
    assert (vector(encoder, delta) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


def test_the_base_has_the_prompts_of_its_checkpoint(tmp_path: Path) -> None:
    tiny.save("bert", tmp_path / "base")
    told = {"prompts": {"query": "the question ? ", "passage": "the text . "}, "default_prompt_name": None}
    (tmp_path / "base" / "config_sentence_transformers.json").write_text(json.dumps(told))
    pipeline = Pipeline(Encoder.load(tmp_path / "base"))
    expected = pipeline("the text . a dog").answer["embedding"]
    for fields in ({"input_type": "document"}, {"prompt_name": "passage"}):
        assert pipeline({"text": "a dog", **fields}).answer["embedding"] == pytest.approx(expected, abs=1e-6)
    (tmp_path / "base" / "config_sentence_transformers.json").write_text('{"prompts": [1]}')
    with pytest.raises(FormatError, match="'prompts' holds no texts by name"):
        Encoder.load(tmp_path / "base")


def test_prompts_are_read_and_chosen_as_there(tmp_path: Path) -> None:
    """The prompt's tokens are pooled with the text's, as where sentence-transformers includes them."""
    encoder = tiny.encoder("bert", tmp_path / "base")
    pooling = {"pooling_mode": "mean", "include_prompt": True}
    model = written(tmp_path / "x", tmp_path / "base", pooling, normalize=False)
    prompts = {"query": "the question ? ", "passage": "the text . ", "none": ""}
    told = {"prompts": prompts, "default_prompt_name": "passage"}
    (tmp_path / "x" / "config_sentence_transformers.json").write_text(json.dumps(told))
    delta = encoder.read_delta(tmp_path / "x")
    assert dict(delta.task.prompts) == {**prompts, "": "the text . "}
    pipeline = Pipeline(encoder, [delta])
    for fields, prompt in (
        ({"input_type": "query"}, "the question ? "),
        ({"prompt_name": "query"}, "the question ? "),
        ({"input_type": "search_document"}, "the text . "),
        ({}, "the text . "),
    ):
        with torch.no_grad():
            rows = model(**encoder.tokenizer(prompt + "a red house", return_tensors="pt")).last_hidden_state[0]
        answer = pipeline({"text": "a red house", **fields}, delta=delta.name).answer
        assert answer["embedding"] == pytest.approx(rows.mean(0).tolist(), abs=1e-5)
    (tmp_path / "x" / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean", "include_prompt": false}')
    with pytest.raises(Unsupported, match="include_prompt is false"):
        encoder.read_delta(tmp_path / "x")


def sentence_encoder(place: Path, pooling: str, *further: str, longest: int | None = None) -> Path:
    """A tiny encoder with what sentence-transformers writes beside weights, its modules after the pooling among it."""
    tiny.save("bert", place)
    names = {"": "Transformer", "1_Pooling": "Pooling"} | {f"{i}_{name}": name for i, name in enumerate(further, 2)}
    told = {
        "modules.json": [{"type": MODULES + name, "path": path} for path, name in names.items()],
        "1_Pooling/config.json": {"pooling_mode": pooling},
        "config_sentence_transformers.json": {"prompts": {"query": "the question ? "}},
        "sentence_bert_config.json": {"max_seq_length": longest},
    }
    for name, values in told.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(json.dumps(values))
    return place


@pytest.mark.parametrize(
    ("mode", "further", "longest"), [("cls", ("Normalize",), None), ("max", (), None), ("mean", (), 6)]
)
def test_the_base_embeds_as_its_checkpoint_says(tmp_path: Path, mode: str, further: Any, longest: int | None) -> None:
    encoder = Encoder.load(sentence_encoder(tmp_path, mode, *further, longest=longest))
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    inputs = encoder.tokenizer(TEXT, return_tensors="pt", truncation=True, max_length=longest or encoder.max_tokens)
    with torch.inference_mode():
        expected = pooled(model(**inputs).last_hidden_state[0], mode)
    expected = torch.nn.functional.normalize(expected, dim=0) if further else expected
    assert Pipeline(encoder)(TEXT).answer["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("mode", "further", "why"),
    [
        ("weightedmean", (), "pooling by weightedmean is not computed here"),
        ("lasttoken", (), "pooling by lasttoken is not computed here"),
        ("mean", ("Dense",), "lists Transformer, Pooling, Dense"),
    ],
)
def test_a_base_that_embeds_otherwise_answers_no_embeddings(tmp_path: Path, mode: str, further: Any, why: str) -> None:
    encoder = Encoder.load(sentence_encoder(tmp_path, mode, *further))
    with pytest.raises(Unsupported, match=f"the base answers no embeddings here: .*{why}"):
        Pipeline(encoder)(TEXT)
    rows = [{"text": "a good film", "label": "up"}, {"text": "a bad film", "label": "down"}]
    delta = bs.train(encoder, rows, eval=rows, max_steps=1, name="mood")
    assert Pipeline(encoder, [delta])(TEXT, delta="mood").answer["label"] in ("up", "down")


def test_a_sentence_encoder_is_read_from_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the files of a snapshot are links to others, which lie elsewhere in it."""
    own = sentence_encoder(tmp_path / "x", "cls", "Normalize")
    place, commit = tmp_path / "hub" / "models--acme--tiny", "0" * 40
    for folder in ("refs", "blobs"):
        (place / folder).mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    for number, file in enumerate(file for file in own.rglob("*") if file.is_file()):
        shutil.copy(file, place / "blobs" / str(number))
        link = place / "snapshots" / commit / file.relative_to(own)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(place / "blobs" / str(number))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    encoder = Encoder.load("acme/tiny")
    assert encoder.base_task == Encoder.load(own).base_task
    assert (encoder.base_task.pooling, encoder.base_task.prompts) == ("cls", (("query", "the question ? "),))


def test_of_an_encoder_of_the_hub_that_is_no_sentence_encoder_one_file_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda path, name, **_: asked.append(name))
    assert read_sentence_task("acme/plain", 64) is None
    assert asked == ["modules.json"]


def test_an_empty_prompt_is_one(tmp_path: Path) -> None:
    """Where another one is the default, nothing is read before texts of that name."""
    place = sentence_encoder(tmp_path, "mean")
    told = {"prompts": {"query": "the question ? ", "document": ""}, "default_prompt_name": "query"}
    (place / "config_sentence_transformers.json").write_text(json.dumps(told))
    pipeline = Pipeline(Encoder.load(place))
    prompted, plain = (pipeline({"text": text, "prompt_name": "document"}) for text in (f"the question ? {TEXT}", TEXT))
    assert pipeline({"text": TEXT, "input_type": "document"}).answer == plain.answer
    for asked in ({"text": TEXT}, {"text": TEXT, "input_type": "query"}):
        assert pipeline(asked).answer["embedding"] == pytest.approx(prompted.answer["embedding"], abs=1e-6)
