from __future__ import annotations

import dataclasses

import pytest

from bertology_serve.deltas.delta import BaseRef, Delta
from bertology_serve.export.emitter.emit import BackEnd
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.layout import base_name, delta_hash, longest, metadata
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.export.cases import CLASSES, DELTAS


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
