from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from bertology_serve.export.emitter.emit import BackEnd
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.layout import card, config, example, metadata, write_directory
from bertology_serve.export.verify import Verification
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.export.cases import DELTAS

DENSE = BackEnd(True, False, 20)
REPORT = Verification("onnxruntime 1", "P", 1e-5, 1e-7, 1e-8, 1.0, 0.0, 2.5, 3, ())


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
    facts = metadata(encoder, delta, ExportInputs.of(encoder, delta, True), ExportSpec(), DENSE, "x")
    out = tmp_path / "out"
    out.mkdir()
    encoder.tokenizer("a b", padding="max_length", max_length=9, truncation=True)  # leaves its switches on
    write_directory(out, "onnx/model.onnx", encoder, delta, facts, REPORT)
    read = AutoConfig.from_pretrained(out)
    assert [read.id2label[i] for i in range(len(read.id2label))] == labels
    assert read.architectures == [architecture]
    assert read.problem_type == {"lora-one-layer": "regression", "folds": "single_label_classification"}.get(name)
    tokenizer = AutoTokenizer.from_pretrained(out)
    named = json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert named == "PreTrainedTokenizerFast"  # transformers 4 knows no other name for it
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
    facts = metadata(encoder, delta, ExportInputs.of(encoder, delta, False), ExportSpec(), DENSE, "x")
    assert config(encoder, delta, facts)["architectures"] == ["BertModel"]
    assert "session.run(['sentence_embedding'], " in example("model.onnx", facts, "there")


@pytest.mark.parametrize(("pooling", "normalize"), [("cls", True), ("mean", False), ("max", True)])
def test_sentence_transformers_is_told_how_to_pool(pooling, normalize, tmp_path):
    """Without these files it takes the mean, whatever the task says."""
    encoder = tiny.encoder("bert", tmp_path / "base")
    task = TaskSpec("embedding", max_length=20, head="none", pooling=pooling, normalize=normalize)
    delta = tiny.delta(encoder, "x", DELTAS["lora"][0], task)
    facts = metadata(encoder, delta, ExportInputs.of(encoder, delta, True), ExportSpec(), DENSE, "x")
    (tmp_path / "out").mkdir()
    write_directory(tmp_path / "out", "onnx/model.onnx", encoder, delta, facts, REPORT)
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert [one["type"].rpartition(".")[2] for one in modules] == ["Transformer", "Pooling", "Normalize"][
        : 2 + normalize
    ]
    read = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert read.pop("word_embedding_dimension") == 32
    assert [name for name, value in read.items() if value] == [
        {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}[pooling]
    ]
    assert json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text())["max_seq_length"] == 20


def test_the_card_survives_any_label(tmp_path):
    facts = {"name": "x", "delta_name": "x", "task": "t", "base_name": "b", "tool": "t", "inputs": "input_ids: i"}
    text = card("model.onnx", {**facts, "outputs": "logits: o", "labels": '["a|b\\nc", "d\ne"]'}, REPORT)
    assert '| labels | ["a\\|b\\nc", "d e"] |' in text
