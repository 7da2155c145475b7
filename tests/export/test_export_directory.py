from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import onnx_ir
import onnxruntime
import pytest
from transformers import AutoConfig, AutoTokenizer

from bertology_serve.deltas.delta import BaseRef, Delta
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import SpecError
from bertology_serve.export import onnx_engine
from bertology_serve.export.emitter.emit import BackEnd
from bertology_serve.export.export_directory import (
    annotate,
    base_name,
    card,
    config,
    delta_hash,
    example,
    longest,
    metadata,
    save,
    triton_config,
    write_directory,
)
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import MODEL, ExportSpec
from bertology_serve.export.exporting import export_delta
from bertology_serve.export.verify import Verification
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.export.cases import CLASSES, DELTAS, FOLDS

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


@pytest.mark.parametrize(
    ("pooling", "normalize", "prompts", "told"),
    [
        ("cls", True, (("query", "q: "), ("", "q: ")), ({"query": "q: "}, "query")),
        ("mean", False, (("query", "q: "), ("", "d: ")), ({"query": "q: ", "default": "d: "}, "default")),
        ("max", True, (), ({}, None)),
    ],
)
def test_sentence_transformers_is_told_how_to_pool(pooling, normalize, prompts, told, tmp_path):
    """Without these files it takes the mean and no prompt, whatever the task says."""
    encoder = tiny.encoder("bert", tmp_path / "base")
    task = TaskSpec("embedding", max_length=20, head="none", pooling=pooling, normalize=normalize, prompts=prompts)
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
    settings = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    assert (settings["prompts"], settings["default_prompt_name"]) == told


def test_questions_that_were_trained_without_token_types_get_none(tmp_path):
    """As peft trains them: the graph takes none, and the tokenizer beside it gives none."""
    encoder = tiny.encoder("bert", tmp_path / "base")
    task = TaskSpec("question-answering", max_length=40, stride=8, token_types=False)
    delta = tiny.delta(encoder, "x", DELTAS["lora"][0], task)
    record = {"question": "who was good", "context": "the cat was very good , not bad"}
    (asked,) = Pipeline(encoder, [delta]).answer([Request("x", record, logits=True)])
    out = export_delta(encoder, delta, tmp_path / "out", ExportSpec(merge=True)).directory
    texts = AutoTokenizer.from_pretrained(out)(*record.values(), return_tensors="np")
    assert sorted(texts) == ["attention_mask", "input_ids"]
    session = onnxruntime.InferenceSession(out / MODEL["hf"])
    found = np.stack(session.run(["start_logits", "end_logits"], dict(texts)), -1)[0]
    np.testing.assert_allclose(found, np.array(asked.answer["logits"]), atol=1e-5)


def test_the_card_survives_any_label(tmp_path):
    facts = {"name": "x", "delta_name": "x", "task": "t", "base_name": "b", "tool": "t", "inputs": "input_ids: i"}
    text = card("model.onnx", {**facts, "outputs": "logits: o", "labels": '["a|b\\nc", "d\ne"]'}, REPORT)
    assert '| labels | ["a\\|b\\nc", "d e"] |' in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("minilm", "minilm"),
        ("microsoft/deberta-v3-base", "microsoft/deberta-v3-base"),
        ("/home/ada/models/bert", "bert"),
        ("./models/bert", "bert"),
        ("../bert", "bert"),
        ("~/bert", "bert"),
    ],
)
def test_a_directory_of_this_machine_is_not_named(name, shown):
    assert base_name(Delta("x", BaseRef(name, "", "bert"), CLASSES)) == shown


def test_the_hash_follows_content_only(tmp_path):
    encoder = tiny.encoder("bert", tmp_path)
    first, same, other = (tiny.delta(encoder, "x", *DELTAS["folds"], seed=seed) for seed in (1, 1, 2))
    renamed = dataclasses.replace(same, name="y", version="9", metrics={"accuracy": 1.0})
    assert delta_hash(first) == delta_hash(renamed)
    assert delta_hash(first) != delta_hash(other)
    relabelled = dataclasses.replace(first, task=dataclasses.replace(CLASSES, labels=("good", "bad", "none")))
    assert delta_hash(first) != delta_hash(relabelled)


def test_shifted_virtual_tokens_take_room_from_the_text(tmp_path):
    encoder = tiny.encoder("roberta", tmp_path)
    task = TaskSpec("classification", ("a", "b"), max_length=64)
    kinds = {
        64: [Prompt(5), Prefix(4)],
        63: [Prompt(5, positions="shifted")],
        59: [Prompt(5, "before_cls", "shifted"), Prefix(4, "shifted")],
    }
    assert encoder.anatomy.max_tokens == 68
    assert {longest(encoder, tiny.delta(encoder, "x", specs, task)): specs for specs in kinds.values()} == kinds


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("folds", "logits: float32 [batch, 3], before any softmax"),
        ("pfeiffer", "logits: float32 [batch, sequence, 3], zero at padding, before any softmax"),
        (
            "prefix-shifted",
            "last_hidden_state, sentence_embedding: float32 [batch, sequence, hidden], zero at padding, and pooled "
            "[batch, hidden], of unit length",
        ),
        (
            "prefix",
            "start_logits, end_logits: float32 [batch, sequence] each, before any softmax, zero at padding",
        ),
        (
            "bitfit-attention",
            "logits: float32 [batch, 1], one row a choice: the caller groups a question's rows and takes the largest",
        ),
    ],
)
def test_inputs_and_outputs_are_explained(name, output, tmp_path):
    encoder = tiny.encoder("bert", tmp_path)
    delta = tiny.delta(encoder, "x", *DELTAS[name])
    facts = metadata(
        encoder, delta, ExportInputs.of(encoder, delta, False), ExportSpec(), BackEnd(True, True, 23), "shown"
    )
    assert facts["outputs"] == output
    assert facts["inputs"].startswith("input_ids, attention_mask, token_type_ids: int64 [batch, sequence]; ")
    assert facts["name"] == "shown"
    assert all(isinstance(value, str) and value for value in facts.values())


def linear_model() -> onnx_ir.Model:
    """``y = x w`` with w [4, 300]."""
    x = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["batch", 4])
    w = onnx_ir.val("w", const_value=onnx_ir.tensor(np.arange(1200, dtype=np.float32).reshape(4, 300), name="w"))
    node = onnx_ir.node("MatMul", [x, w])
    node.outputs[0].name = "y"
    node.outputs[0].dtype = onnx_ir.DataType.FLOAT
    graph = onnx_ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 20})
    return onnx_ir.Model(graph, ir_version=10)


def run(path):
    return onnxruntime.InferenceSession(str(path)).run(None, {"x": np.ones((1, 4), dtype=np.float32)})[0]


def test_large_weights_get_a_file_of_their_own(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    model = linear_model()
    annotate(model, {"b": "2", "a": "1"})
    small = save(model, tmp_path / "a" / "model.onnx")
    large = save(model, tmp_path / "b" / "model.onnx", external_over=1000)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model.onnx"]
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"model.onnx", "model.onnx_data"}
    assert small == (tmp_path / "a" / "model.onnx").stat().st_size
    assert large == sum(path.stat().st_size for path in (tmp_path / "b").iterdir())
    assert np.array_equal(run(tmp_path / "a" / "model.onnx"), run(tmp_path / "b" / "model.onnx"))
    assert list(onnx_ir.load(tmp_path / "b" / "model.onnx").metadata_props.items()) == [("a", "1"), ("b", "2")]


@pytest.mark.parametrize(
    ("family", "name", "output"),
    [
        ("bert", "folds", '{ name: "logits", data_type: TYPE_FP32, dims: [ 3 ] }'),
        ("roberta", "houlsby-gelu", '{ name: "logits", data_type: TYPE_FP32, dims: [ -1, 3 ] }'),
        ("mpnet", "prefix-shifted", '{ name: "sentence_embedding", data_type: TYPE_FP32, dims: [ 32 ] }'),
        ("mpnet", "prefix-shifted", '{ name: "last_hidden_state", data_type: TYPE_FP32, dims: [ -1, 32 ] }'),
        ("electra", "prefix", '{ name: "start_logits", data_type: TYPE_FP32, dims: [ -1 ] }'),
    ],
)
def test_inputs_and_outputs_are_those_of_the_file(family, name, output, tmp_path):
    encoder = tiny.encoder(family, tmp_path)
    parts = ExportInputs.of(encoder, tiny.delta(encoder, "x", *DELTAS[name]), True)
    text = triton_config(parts, labelled=False)
    assert output in text
    assert tuple(re.findall(r'name: "(\w+)", data_type: TYPE_INT64, dims: \[ -1 \]', text)) == parts.inputs
    assert text.count("{") == text.count("}")
    assert text.startswith('backend: "onnxruntime"\n')
    assert "\nname:" not in text  # the directory's


def test_a_model_of_a_model_repository(tmp_path):
    encoder = tiny.encoder("bert", tmp_path / "base")
    delta = tiny.delta(encoder, "mood", FOLDS, CLASSES)
    out = tmp_path / "models" / "mood"
    spec = ExportSpec(merge=True, layout="triton")
    done = export_delta(encoder, delta, out, spec)
    assert {"1", "config.pbtxt", "labels.txt", "tokenizer.json", "verification.json"} <= {p.name for p in out.iterdir()}
    assert [path.name for path in (out / "1").iterdir()] == ["model.onnx"]
    assert (out / "labels.txt").read_text() == "bad\ngood\nnone\n"
    assert 'dims: [ 3 ], label_filename: "labels.txt" }' in (out / "config.pbtxt").read_text()
    assert "mood/1/model.onnx" in done.example
    with pytest.raises(SpecError, match="give --overwrite"):
        export_delta(encoder, delta, out, spec)

    flat = export_delta(encoder, delta, tmp_path / "flat", ExportSpec(merge=True, layout="flat"))
    assert (tmp_path / "flat" / "model.onnx").read_bytes() == (out / "1" / "model.onnx").read_bytes()
    assert not (tmp_path / "flat" / "config.pbtxt").exists()
    assert "`model.onnx` is mood" in (tmp_path / "flat" / "README.md").read_text()
    assert "flat/model.onnx" in flat.example
    assert set(MODEL) == {"hf", "flat", "triton", "web"}


@pytest.mark.parametrize(
    "task",
    [
        TaskSpec("embedding", head="none", pooling="mean", prompts=(("query", "q: "), ("", "d: ")), dimensions=(32, 8)),
        TaskSpec("embedding", head="none", pooling="cls", normalize=False, ranges=((-1.0,) * 32, (1.0,) * 32)),
        TaskSpec("multi-label", ("a", "b"), thresholds=(0.3, 0.6)),
    ],
)
def test_an_export_says_all_of_its_task(task, tmp_path):
    encoder = tiny.encoder("bert", tmp_path / "base")
    delta = tiny.delta(encoder, "x", DELTAS["lora"][0], dataclasses.replace(task, max_length=20))
    facts = metadata(encoder, delta, ExportInputs.of(encoder, delta, True), ExportSpec(), DENSE, "x")
    assert onnx_engine._delta(facts).task == delta.task
