from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from bertology_serve.export.back_ends import Chosen
from bertology_serve.export.layout import card, config, example, write_around
from bertology_serve.export.metadata import metadata
from bertology_serve.export.parts import parts_of
from bertology_serve.export.spec import ExportSpec
from bertology_serve.export.verify import Report
from tests import tiny
from tests.export.cases import DELTAS

DENSE = Chosen(True, False, 20)
REPORT = Report("onnxruntime 1", "P", 1e-5, 1e-7, 1e-8, 1.0, 0.0, 2.5, 3, ())


@pytest.mark.parametrize(
    ("family", "name", "architecture", "labels"),
    [
        ("bert", "folds", "BertForSequenceClassification", ["bad", "good", "none"]),
        ("deberta-v3", "pfeiffer", "DebertaV2ForTokenClassification", ["O", "B-LOC", "I-LOC"]),
        ("modernbert", "prefix", "ModernBertForQuestionAnswering", ["LABEL_0", "LABEL_1"]),
        ("roberta", "lora-one-layer", "RobertaForSequenceClassification", ["LABEL_0"]),
        ("electra", "bitfit-attention", "ElectraForMultipleChoice", ["LABEL_0"]),
    ],
)
def test_huggingface_reads_what_is_beside_the_model(family, name, architecture, labels, tmp_path):
    encoder = tiny.encoder(family, tmp_path / "base")
    delta = tiny.delta(encoder, "x", *DELTAS[name])
    facts = metadata(encoder, delta, parts_of(encoder, delta, True), ExportSpec(), DENSE, "x")
    out = tmp_path / "out"
    out.mkdir()
    encoder.tokenizer("a b", padding="max_length", max_length=9, truncation=True)  # leaves its switches on
    write_around(out, "onnx/model.onnx", encoder, delta, facts, REPORT)
    read = AutoConfig.from_pretrained(out)
    assert [read.id2label[i] for i in range(len(read.id2label))] == labels
    assert read.architectures == [architecture]
    assert read.problem_type == {"lora-one-layer": "regression", "folds": "single_label_classification"}.get(name)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.model_max_length == delta.task.max_length
    assert tokenizer.backend_tokenizer.padding is None
    assert len(tokenizer("the cat " * 60, truncation=True)["input_ids"]) == delta.task.max_length
    assert encoder.tokenizer.model_max_length == 64
    values = json.loads((out / "config.json").read_text())
    assert values["bertology_serve"]["task"] == delta.task.kind
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert json.loads((out / "verification.json").read_text())["passed"] is True


def test_embeddings_keep_the_architecture_of_the_base(tmp_path):
    encoder = tiny.encoder("bert", tmp_path)
    delta = tiny.delta(encoder, "x", *DELTAS["prefix-shifted"])
    facts = metadata(encoder, delta, parts_of(encoder, delta, False), ExportSpec(), DENSE, "x")
    assert config(encoder, delta, facts)["architectures"] == ["BertModel"]
    assert "session.run(['embedding']" in example("model.onnx", facts, "there")


def test_the_card_survives_any_label(tmp_path):
    facts = {"name": "x", "delta_name": "x", "task": "t", "base_name": "b", "tool": "t", "inputs": "input_ids: i"}
    text = card("model.onnx", {**facts, "outputs": "logits: o", "labels": '["a|b\\nc", "d\ne"]'}, REPORT)
    assert '| labels | ["a\\|b\\nc", "d e"] |' in text
