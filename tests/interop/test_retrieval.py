"""Sparse and multi-vector answers beside transformers' masked language models and sentence-transformers."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.bank import DeltaBank
from bertology_serve.encoder.batch import PackedBatch
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import FormatError, Unsupported
from bertology_serve.families import family_named
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny

TEXTS = [
    "the cat was very good , not bad",
    "Ada met a dog in Paris .",
    "river",
    " ".join(tiny.WORDS[:30]),
    "where is the money ? in the bank !",
]
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*", "ignore:.*sentence_transformers.*")
CONFIGS = tiny.CONFIGS | tiny.OTHERS
FAMILIES = [name for name, make in CONFIGS.items() if family_named(make().model_type).words is not None]


def saved(family: str, directory: Path) -> str:
    """A masked language model with random weights and its tokenizer; returns the path."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(CONFIGS[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    tiny.tokenizer(family).save_pretrained(directory)
    return str(directory)


def sparse_task(encoder: Encoder) -> TaskSpec:
    return TaskSpec("sparse", max_length=32, width=len(encoder.model.get_input_embeddings().weight))


def weights(pipeline: Pipeline, name: str, text: str, width: int) -> Tensor:
    row = torch.zeros(width, dtype=torch.float64)
    for entry in pipeline(text, name).answer["sparse"]:
        row[entry["index"]] = entry["value"]
    return row


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_weights_are_those_of_the_masked_language_model(family: str, tmp_path: Path) -> None:
    """Its head is in the checkpoint, so that a delta without any tensor answers as SPLADE does with it."""
    encoder = Encoder(saved(family, tmp_path / "mlm"))
    task = sparse_task(encoder)
    assert encoder.head(task).own_tensors() == {}
    pipeline = Pipeline(encoder, [Delta("sparse", encoder.ref, task, version="1")])
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "mlm", attn_implementation="eager").eval().double()
    assert "sparse" in pipeline.deltas
    answers = pipeline(TEXTS, "sparse")
    for text, answer in zip(TEXTS, answers, strict=True):
        batch = encoder.tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
        with torch.no_grad():
            logits = model(**batch).logits[0]
        expected = logits.relu().log1p().amax(0)
        found = torch.zeros_like(expected)
        for entry in answer.answer["sparse"]:
            found[entry["index"]] = entry["value"]
        assert (found - expected).abs().max() <= 1e-5
    assert 0 < sum(len(one.answer["sparse"]) for one in answers) < len(TEXTS) * task.width


def test_sparse_weights_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    sparse = pytest.importorskip("sentence_transformers.sparse_encoder")
    encoder = Encoder(saved("bert", tmp_path / "mlm"))
    task = sparse_task(encoder)
    pipeline = Pipeline(encoder, [Delta("sparse", encoder.ref, task, version="1")])
    theirs = sparse.SparseEncoder(str(tmp_path / "mlm"), device="cpu", local_files_only=True)
    theirs.max_seq_length = 32
    expected = theirs.encode(TEXTS, convert_to_sparse_tensor=False).double()
    found = torch.stack([weights(pipeline, "sparse", text, task.width) for text in TEXTS])
    assert (found - expected).abs().max() <= 1e-5
    scores = theirs.similarity(expected[:1], expected[1:])[0]
    for text, score in zip(TEXTS[1:], scores.tolist(), strict=True):
        (one,) = pipeline([{"text": TEXTS[0], "text_pair": text}], "sparse")
        assert one.answer["similarity"] == pytest.approx(score, rel=1e-5)
    named = theirs.decode(expected[0], top_k=3)
    assert [(entry["token"], entry["value"]) for entry in pipeline(TEXTS[0], "sparse").answer["sparse"][:3]] == [
        (token, pytest.approx(value, abs=1e-5)) for token, value in named
    ]


@pytest.mark.parametrize("skip", [True, False])
def test_vectors_are_those_of_sentence_transformers(skip: bool, tmp_path: Path) -> None:
    multi = pytest.importorskip("sentence_transformers.multi_vector_encoder")
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    encoder = tiny.encoder("bert", tmp_path / "base")
    task = TaskSpec("multi-vector", max_length=32, width=8, skip_punctuation=skip)
    delta = tiny.delta(encoder, "tokens", [], task)
    pipeline = Pipeline(encoder, [delta])
    dense = Dense(
        32, 8, bias=False, activation_function=nn.Identity(),
        module_input_name="token_embeddings", module_output_name="token_embeddings",
    )  # fmt: skip
    with torch.no_grad():
        dense.linear.weight.copy_(delta.head["linear.weight"])
    transformer = Transformer(str(tmp_path / "base"), max_seq_length=32)
    mask = MultiVectorMask(list(string.punctuation) if skip else [])
    modules = [transformer, dense, Normalize(module_input_name="token_embeddings"), mask]
    theirs = multi.MultiVectorEncoder(modules=modules, device="cpu")
    documents, queries = theirs.encode_document(TEXTS), theirs.encode_query(TEXTS)
    for text, expected in zip(TEXTS, documents, strict=True):
        answer = pipeline(text, "tokens").answer
        found = torch.tensor(answer["vectors"])
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5
        tokens = encoder.tokenizer.convert_ids_to_tokens(encoder.tokenizer(text)["input_ids"])
        assert answer["tokens"] == [one for one in tokens if not skip or one not in string.punctuation]
    scores = theirs.similarity(queries[:1], documents)[0]
    for text, score in zip(TEXTS, scores.tolist(), strict=True):
        (one,) = pipeline([{"text": TEXTS[0], "text_pair": text}], "tokens")
        assert one.answer["similarity"] == pytest.approx(score, rel=1e-5)


def test_one_text_is_asked_for_all_its_vectors_and_a_class_in_one_pass(tmp_path: Path) -> None:
    """As each delta answers alone; what changes no layer shares all rows, and a text that repeats is read once."""
    encoder = tiny.encoder("bert", tmp_path)
    tasks = {
        "dense": TaskSpec("embedding", max_length=32, pooling="mean", head="none"),
        "sparse": sparse_task(encoder),
        "tokens": TaskSpec("multi-vector", max_length=32, width=8),
        "class": TaskSpec("classification", ("a", "b"), 32),
    }
    deltas = [tiny.delta(encoder, name, [], task) for name, task in tasks.items()]
    deltas.append(tiny.delta(encoder, "lora", [Lora(rank=2)], sparse_task(encoder)))
    pipeline = Pipeline(encoder, deltas)
    names = [*tasks, "lora", "sparse"]
    alone = [dict(pipeline(TEXTS[0], name).answer) for name in names]
    ran, reads = list[PackedBatch](), list[int]()

    class Watched:
        def run(self, batch: PackedBatch, pools: DeltaBank) -> Tensor:
            ran.append(batch)
            return encoder.run(batch, pools)

    pipeline.engine = Watched()
    head = pipeline.loaded("sparse").head  # type: ignore[union-attr]
    before = head.read
    head.read = lambda rows, lengths, task: reads.append(len(lengths)) or before(rows, lengths, task)  # type: ignore[method-assign,assignment,func-returns-value]
    found = pipeline.run([pipeline.prepare(Request(name, {"text": TEXTS[0]})) for name in names])
    assert [batch.sequences for batch in ran] == [2], "one for all that change no layer, one for the LoRA"
    assert reads == [1]
    for one, expected in zip(found, alone, strict=True):
        assert one.answer.keys() == expected.keys()
        for field, value in expected.items():
            if field == "sparse":
                mine, theirs = (
                    {entry["index"]: entry["value"] for entry in side} for side in (one.answer[field], value)
                )
                assert mine == pytest.approx(theirs, abs=1e-5)
            elif field not in ("label", "tokens"):
                assert flat(one.answer[field]) == pytest.approx(flat(value), abs=1e-5)


def flat(value: Any) -> list[float]:
    if isinstance(value, dict):
        return list(value.values())
    return torch.tensor(value).flatten().tolist()  # type: ignore[no-any-return]


def test_other_words_than_the_encoder_s_are_refused_by_name(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    with pytest.raises(FormatError, match=r"weighs 7 words, but the encoder's are \[\d+, 32\]"):
        encoder.head(TaskSpec("sparse", width=7))
    encoder.config.tie_word_embeddings = False
    with pytest.raises(Unsupported, match="tie_word_embeddings is false"):
        encoder.head(sparse_task(encoder))
