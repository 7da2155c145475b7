"""Late chunking: a vector of each part of a text, from rows that have seen all of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import DataError, LimitError, Unsupported
from bertology_serve.export.onnx_engine import OnnxEngine
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny

TEXT = "The cat was good .  Ada met the dog in London ! the river was very cold"
SPANS = [[0, 19], [19, 47], [47, len(TEXT)], [4, 7]]
MEAN: dict[str, Any] = {"head": "none", "pooling": "mean"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return tiny.encoder("bert", tmp_path_factory.mktemp("chunks") / "bert")


def bare(encoder: Encoder, name: str, **task: Any) -> Delta:
    return Delta(name, encoder.ref, TaskSpec("embedding", **MEAN | {"max_length": 40} | task), version="1")


def expected(encoder: Encoder, text: str, spans: list[list[int]], prompt: str = "", unit: bool = True) -> np.ndarray:
    """The means of transformers' rows of the whole text, in float64."""
    model = AutoModel.from_pretrained(encoder.name).double().eval()
    tokens = encoder.tokenizer(prompt + text, return_tensors="pt", return_offsets_mapping=True)
    offsets = tokens.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        rows = model(**tokens).last_hidden_state[0]
    means = []
    for start, end in spans:
        own = [i for i, (a, b) in enumerate(offsets) if b > a and start <= a - len(prompt) < end]
        mean = rows[own].mean(0)
        means.append(mean / mean.norm() if unit else mean)
    return torch.stack(means).numpy()


def vectors(answer: Any) -> np.ndarray:
    return np.array([chunk["embedding"] for chunk in answer["chunks"]])


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_chunks_are_means_of_the_rows_of_the_whole_text(made, engine):
    deltas = [bare(made, "x", prompts=(("query", "who went ? "),)), bare(made, "raw", normalize=False)]
    pipeline = Pipeline(made, deltas)
    if engine == "onnx":
        pipeline.engine = OnnxEngine(made)
    asked = {"text": TEXT, "pooling": "chunks", "chunks": SPANS}
    records = [
        Request("x", asked),
        Request("raw", asked),
        Request("x", {"text": TEXT}),
        Request("x", asked | {"input_type": "query"}),
        Request("base", asked),
    ]
    plain, raw, whole, prompted, base = (found.answer for found in pipeline.answer(records))
    assert [(one["start"], one["end"]) for one in plain["chunks"]] == [tuple(span) for span in SPANS]
    np.testing.assert_allclose(vectors(plain), expected(made, TEXT, SPANS), atol=1e-6, rtol=0)
    np.testing.assert_allclose(vectors(base), vectors(plain), atol=1e-6, rtol=0)
    np.testing.assert_allclose(vectors(raw), expected(made, TEXT, SPANS, unit=False), atol=1e-6, rtol=0)
    np.testing.assert_allclose(vectors(prompted), expected(made, TEXT, SPANS, "who went ? "), atol=1e-6, rtol=0)
    assert "chunks" not in whole
    assert len(whole["embedding"]) == 32


def test_chunks_of_so_many_tokens(made):
    pipeline = Pipeline(made, [bare(made, "x")])
    answer = pipeline({"text": TEXT, "pooling": "chunks", "chunk_tokens": 5}, delta="x").answer
    spans = [[one["start"], one["end"]] for one in answer["chunks"]]
    words = [len(made.tokenizer.tokenize(TEXT[start:end])) for start, end in spans]
    assert words == [5, 5, 5, 2]
    assert [TEXT[start:end].split()[0] for start, end in spans] == ["The", "Ada", "London", "very"]
    np.testing.assert_allclose(vectors(answer), expected(made, TEXT, spans), atol=1e-6, rtol=0)


def test_chunks_with_a_delta_that_has_virtual_tokens_are_the_text_s_alone(made):
    """One chunk of all tokens, and the mean of the whole text without its two special rows."""
    specs = [Lora(rank=2), Prompt(3)]
    delta = tiny.delta(made, "x", specs, TaskSpec("embedding", **MEAN, max_length=40, normalize=False), 2)
    pipeline = Pipeline(made, [delta])
    asked = {"text": TEXT, "pooling": "chunks", "chunk_tokens": 100}
    one, whole = (
        found.answer for found in pipeline.answer([Request("x", asked, logits=True), Request("x", {"text": TEXT})])
    )
    rows = np.array(one["logits"])
    np.testing.assert_allclose(rows.mean(0), whole["embedding"], atol=1e-6)
    np.testing.assert_allclose(rows[1:-1].mean(0), vectors(one)[0], atol=1e-6)


def test_chunks_of_a_long_text_come_from_the_windows_that_own_their_tokens(made):
    task = TaskSpec("embedding", **MEAN, max_length=14, stride=4, long="windows", normalize=False)
    pipeline = Pipeline(made, [Delta("x", made.ref, task, version="1")])
    found = pipeline({"text": TEXT, "pooling": "chunks", "chunk_tokens": 1}, delta="x")
    ids = made.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert (found.windows, len(found.answer["chunks"])) == (2, len(ids))
    model, cls, sep = (
        AutoModel.from_pretrained(made.name).eval(),
        made.tokenizer.cls_token_id,
        made.tokenizer.sep_token_id,
    )
    windows = []
    for left in (0, 8):  # 12 tokens each, 4 of them shared: those up to 10 are the first one's
        with torch.no_grad():
            rows = model(torch.tensor([[cls, *ids[left : left + 12], sep]])).last_hidden_state[0, 1:-1]
        windows.append(rows.numpy())
    rows = np.concatenate([windows[0][:10], windows[1][2:]])
    np.testing.assert_allclose(vectors(found.answer), rows, atol=1e-5)
    cut = bare(made, "cut", max_length=14)
    short = Pipeline(made, [cut])({"text": TEXT, "pooling": "chunks", "chunk_tokens": 6}, delta="cut")
    assert short.truncated
    assert len(short.answer["chunks"]) == 2


def test_chunks_are_encoded_as_vectors_are(made):
    pipeline = Pipeline(made, [bare(made, "x", ranges=((-1.0,) * 32, (1.0,) * 32))])
    asked = {"text": TEXT, "pooling": "chunks", "chunks": SPANS, "dimensions": 8}
    floats = vectors(pipeline(asked, delta="x").answer)
    assert np.linalg.norm(floats, axis=1) == pytest.approx(np.ones(4))
    bits = vectors(pipeline(asked | {"encoding_format": "ubinary"}, delta="x").answer)
    assert bits.tolist() == np.packbits(floats > 0, axis=1).tolist()
    several = pipeline(asked | {"embedding_types": ["int8", "float"]}, delta="x").answer["chunks"]
    assert [one["embeddings"].keys() for one in several] == [{"int8", "float"}] * 4


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"chunks": SPANS}, DataError, "send 'pooling': 'chunks' with them"),
        ({"pooling": "chunks"}, DataError, "expected either 'chunks'"),
        ({"pooling": "chunks", "chunks": SPANS, "chunk_tokens": 3}, DataError, "expected either 'chunks'"),
        ({"pooling": "max"}, DataError, "field 'pooling' is 'max'"),
        ({"pooling": "chunks", "chunk_tokens": 0}, DataError, "'chunk_tokens' is 0"),
        ({"pooling": "chunks", "chunks": []}, DataError, r"chunks\[0\] is null"),
        ({"pooling": "chunks", "chunks": [[0, 2, 3]]}, DataError, r"chunks\[0\] is \[0, 2, 3\]"),
        ({"pooling": "chunks", "chunks": [[0, 3], [0, True]]}, DataError, r"chunks\[1\] is \[0, True\]"),
        ({"pooling": "chunks", "chunks": [[0, 3], [3, 999]]}, DataError, r"chunks\[1\] is \[3, 999\]; expected a part"),
        ({"pooling": "chunks", "chunks": [[5, 5]]}, DataError, r"chunks\[0\] is \[5, 5\]; expected a part"),
        ({"pooling": "chunks", "chunks": [[18, 20]]}, DataError, "no token begins that is read"),
        ({"pooling": "chunks", "chunks": [[0, 3]] * 1025}, LimitError, "there are 1025 chunks; at most 1024"),
        ({"pooling": "chunks", "chunks": [[0, 3]], "text_pair": "a"}, DataError, "expected one text"),
        ({"pooling": "chunks", "chunks": [[0, 3]], "dimensions": 99}, DataError, "the embedding has 32"),
    ],
)
def test_chunks_that_cannot_be_given_are_named(made, fields, error, message):
    with pytest.raises(error, match=message):
        Pipeline(made).answer([Request("base", {"text": TEXT, **fields})])


def test_chunks_need_a_mean(made):
    pipeline = Pipeline(made, [bare(made, "x", pooling="cls"), bare(made, "mean")])
    with pytest.raises(Unsupported, match="this delta's pooling is cls; chunks need a mean of rows"):
        pipeline({"text": TEXT, "pooling": "chunks", "chunk_tokens": 3}, delta="x")
    assert "embedding" in pipeline({"text": TEXT, "pooling": "mean"}, delta="mean").answer


def test_random_spans(made):
    """Whatever the spans, each is the mean of the tokens that begin in it."""
    generator = np.random.default_rng(0)
    pipeline = Pipeline(made, [bare(made, "x")])
    spans = [sorted(generator.choice(len(TEXT) + 1, 2, replace=False).tolist()) for _ in range(40)]
    offsets = made.tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    spans = [span for span in spans if any(b > a and span[0] <= a < span[1] for a, b in offsets)]
    answer = pipeline({"text": TEXT, "pooling": "chunks", "chunks": spans}, delta="x").answer
    np.testing.assert_allclose(vectors(answer), expected(made, TEXT, spans), atol=1e-6, rtol=0)
