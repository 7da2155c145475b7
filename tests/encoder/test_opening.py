"""Whole task models of HuggingFace's answer as they do there, and an import that would not is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.opening import WholeModel, is_task_model, read_task_model, task_models, verify, verify_peft
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import BaseMismatch, FormatError, InputError, VerificationError
from tests import tiny

AUTO: dict[str, Any] = {
    "classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "multiple-choice": transformers.AutoModelForMultipleChoice,
}
LABELS = {0: "bad", 1: "good", 2: "none"}
TEXT = "the cat was very good"


def tuned(base: Path, directory: Path, kind: str, **config: Any) -> Any:
    """A task model whose every weight moved from the base's, saved with its tokenizer."""
    labels = {} if kind in ("question-answering", "multiple-choice") else {"id2label": LABELS}
    model = AUTO[kind].from_pretrained(base, **({"num_labels": 1} if kind == "regression" else labels), **config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return model


def logits(encoder: Encoder, delta: Delta) -> Tensor:
    pipeline = Pipeline(encoder)
    pipeline.add(delta)
    (answer,) = pipeline.answer([Request(delta.name, {"text": TEXT}, logits=True)])
    return torch.tensor(answer.answer["logits"])


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "modernbert", "mpnet", "albert"])
def test_a_whole_model_answers_as_transformers_does(tmp_path: Path, family: str) -> None:
    encoder = tiny.encoder(family, tmp_path / "base")
    model = tuned(tmp_path / "base", tmp_path / "mood", "classification").double()
    assert is_task_model(tmp_path / "mood")
    assert not is_task_model(tmp_path / "base")
    delta = read_task_model(tmp_path / "mood", encoder)
    assert (delta.kinds, delta.name, delta.task.labels) == (("full",), "mood", ("bad", "good", "none"))
    assert delta.provenance["verified"].startswith(f"against transformers {transformers.__version__}")
    with torch.no_grad():
        expected = model(**encoder.tokenizer(TEXT, return_tensors="pt")).logits[0]
    assert (logits(Encoder.for_delta(delta), delta) - expected).abs().max() < 1e-5 * max(1, float(expected.abs().max()))


@pytest.mark.parametrize("kind", [kind for kind in AUTO if kind != "classification"])
def test_every_task(tmp_path: Path, kind: str) -> None:
    """Reading verifies: it would raise where the outputs differ."""
    encoder = tiny.encoder("bert", tmp_path / "base")
    tuned(tmp_path / "base", tmp_path / "x", kind)
    delta = read_task_model(tmp_path / "x", encoder, "mine")
    assert (delta.name, delta.task.kind) == ("mine", kind)
    assert delta.task.max_length == encoder.max_tokens


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*")
def test_what_peft_merged_is_read(tmp_path: Path) -> None:
    """Ways of LoRA that are not read as adapters come this way."""
    encoder = tiny.encoder("bert", tmp_path / "base")
    model = AUTO["classification"].from_pretrained(tmp_path / "base", num_labels=3)
    config = peft.LoHaConfig(task_type="SEQ_CLS", target_modules=["query", "dense"], init_weights=False)
    merged = peft.get_peft_model(model, config).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    delta = read_task_model(tmp_path / "merged", encoder)
    with torch.no_grad():
        expected = merged.eval()(**encoder.tokenizer(TEXT, return_tensors="pt")).logits[0]
    assert (logits(Encoder.for_delta(delta), delta) - expected).abs().max() < 1e-5


def test_it_answers_beside_the_deltas_of_an_encoder(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path / "base")
    tuned(tmp_path / "base", tmp_path / "all" / "mood", "classification")
    tuned(tmp_path / "base", tmp_path / "all" / "score", "regression")
    found = [WholeModel.open(path) for path in task_models(tmp_path / "all")]
    assert task_models(tmp_path / "all" / "mood") == [tmp_path / "all" / "mood"]
    pipeline = Pipeline(encoder)
    for model in found:
        pipeline.add_model(model.delta, model)
        assert not model.delta.weights
    requests = [Request(name, {"text": TEXT}, logits=True) for name in ("mood", "base", "score", "mood")]
    mood, base, score, again = pipeline.answer(requests)
    delta = read_task_model(tmp_path / "all" / "mood", encoder)
    assert mood.answer["logits"] == pytest.approx(again.answer["logits"], abs=1e-5)
    torch.testing.assert_close(torch.tensor(mood.answer["logits"]), logits(Encoder.for_delta(delta), delta))
    assert "value" in score.answer
    assert len(base.answer["embedding"]) == 32


def test_several_labels_a_text_are_answered_as_the_pipeline_of_transformers_does(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path / "base")
    model = tuned(tmp_path / "base", tmp_path / "x", "classification", problem_type="multi_label_classification")
    delta = read_task_model(tmp_path / "x", encoder)
    assert (delta.task.kind, delta.task.labels) == ("multi-label", ("bad", "good", "none"))
    pipeline = Pipeline(Encoder.for_delta(delta))
    pipeline.add(delta)
    (found,) = pipeline.answer([Request("x", {"text": TEXT})])
    asked = transformers.pipeline("text-classification", model, tokenizer=encoder.tokenizer, top_k=None, device="cpu")
    expected = {one["label"]: one["score"] for one in asked([TEXT])[0]}
    assert found.answer["scores"] == pytest.approx(expected, abs=1e-5)
    assert found.answer["labels"] == [label for label in LABELS.values() if expected[label] >= 0.5]


def edited(path: Path, **values: Any) -> None:
    table = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(table | values))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"architectures": ["BertForMaskedLM"]}, FormatError, "is no task model"),
        ({"hidden_act": "relu"}, VerificationError, "would answer otherwise here than in transformers"),
        ({"hidden_size": 33}, InputError, "cannot read"),
        ({"id2label": {"0": "a", "2": "b", "5": "c"}, "label2id": {"a": 0, "b": 2, "c": 5}}, FormatError,
         "id2label of config.json names outputs 0, 2, 5; expected 0 to 2"),
        ({"model_type": "electra", "architectures": ["ElectraForSequenceClassification"]}, FormatError, "lacks"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_refused(tmp_path: Path, values: Any, error: type, message: str) -> None:
    encoder = tiny.encoder("bert", tmp_path / "base")
    tuned(tmp_path / "base", tmp_path / "x", "classification")
    edited(tmp_path / "x", **values)
    with pytest.raises(error, match=message):
        read_task_model(tmp_path / "x", encoder)


def test_another_base_is_refused(tmp_path: Path) -> None:
    tuned_from = tiny.encoder("roberta", tmp_path / "other")
    tiny.save("bert", tmp_path / "base")
    tuned(tmp_path / "base", tmp_path / "x", "classification")
    with pytest.raises(BaseMismatch, match=r"x is a bert, but .*other is a roberta"):
        read_task_model(tmp_path / "x", tuned_from)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*")
def test_an_import_that_answers_otherwise_than_peft_is_caught(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path / "base")
    model = AUTO["classification"].from_pretrained(tmp_path / "base", num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "x")
    delta = replace(encoder.read_delta(tmp_path / "x"), name="x")
    assert verify_peft(tmp_path / "x", delta, encoder).startswith(f"against peft {peft.__version__}")
    wrong = replace(delta, tensors={name: tensor * 1.5 for name, tensor in delta.tensors.items()})
    with pytest.raises(VerificationError, match="x would answer otherwise here than in peft"):
        verify_peft(tmp_path / "x", wrong, encoder)
    lost = replace(delta, head={name: tensor * float("nan") for name, tensor in delta.head.items()})
    with pytest.raises(VerificationError, match="differ by inf"):
        verify(theirs, lost, encoder, "peft")
