from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bertology_serve.errors import SpecError
from bertology_serve.families.family import Dense
from bertology_serve.tasks import heads
from bertology_serve.tasks.contrastive import LOSSES, Products, Target, flops
from bertology_serve.tasks.heads import Head, aggregate
from bertology_serve.tasks.sparse_embedding import SparseEmbedding
from bertology_serve.tasks.spec import Encoding, TaskSpec

SPEC = TaskSpec("sparse", max_length=16, width=6)
TASK = SparseEmbedding(SPEC)
ROWS = torch.tensor([[0.0, 2.0, 0.5, 0.0, 1.0, 0.0], [0.0, 0.5, 0.0, 3.0, 1.0, 0.0]])


def texts(count, width=0):
    return [Target((2 * i, 2 * i + 1)) for i in range(count)]


def test_weights_are_named_the_largest_first(minilm):
    task = SparseEmbedding(TaskSpec("sparse", width=30522))
    example = task.example({"text": "good dog"}, "x:1", False)
    encodings = task.encode(example, minilm)
    row = torch.zeros(30522)
    dog, cat = minilm.convert_tokens_to_ids(["dog", "cat"])
    row[cat], row[dog] = 0.25, 1.5
    expected = [{"index": dog, "value": 1.5, "token": "dog"}, {"index": cat, "value": 0.25, "token": "cat"}]
    assert task.decode(example, encodings, [row]) == {"sparse": expected}
    assert task.decode(example, encodings, [torch.zeros(30522)]) == {"sparse": []}


def test_a_pair_is_alike_by_the_product(minilm):
    example = TASK.example({"text": "a", "positive": "b", "negative": "c"}, "x:1", False)
    answer = TASK.decode(example, [], [*ROWS, ROWS[0]])
    assert answer["similarity"] == 2.0
    assert [entry["index"] for entry in answer["sparse_pair"]] == [3, 4, 1]
    assert len(answer["sparse_negatives"]) == 1


def test_only_the_largest_are_kept():
    task = SparseEmbedding(TaskSpec("sparse", width=6, max_terms=2))
    assert task.kept(ROWS).tolist() == [[0, 2, 0, 0, 1, 0], [0, 0, 0, 3, 1, 0]]
    assert task.similarity(*ROWS) == 1.0
    assert [entry["index"] for entry in task.written(ROWS[0])] == [1, 4]
    rows = ROWS.repeat(2, 1).double()
    expected = LOSSES["mnrl"](Products(task.kept(rows)), texts(2)) * 2
    torch.testing.assert_close(task.loss(rows, [], texts(2)), expected)


def test_a_search_ranks_by_the_product():
    task = SparseEmbedding(SPEC)
    rows = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)).relu()
    rows[3] = 0.0
    documents = [task.written(row) for row in rows[1:]]
    found = task.searching(documents)(task.written(rows[0]))
    np.testing.assert_allclose(found, (rows[1:] @ rows[0]).numpy(), rtol=1e-6)
    assert task.searching([[], []])([]).tolist() == [0.0, 0.0]


def test_the_loss_is_that_of_sentence_transformers():
    """Its SparseMultipleNegativesRankingLoss (products, scale 1) with its FlopsLoss of queries and of documents."""
    rows = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).relu()
    asks, documents = rows[0::2], rows[1::2]
    expected = F.cross_entropy(asks @ documents.T, torch.arange(3))
    torch.testing.assert_close(TASK.loss(rows, [], texts(3)), 3 * expected)
    dense = sum((side.mean(0) ** 2).sum() for side in (asks, documents))
    torch.testing.assert_close(flops(rows, texts(3)), dense)
    weighed = [target._replace(flops=0.5) for target in texts(3)]
    torch.testing.assert_close(TASK.loss(rows, [], weighed), 3 * (expected + 0.5 * dense))


def words_head(width=11, hidden=5):
    form = (
        Dense("transform", hidden, hidden, "gelu", norm="norm"),
        Dense("decoder", hidden, width, tied=True),
    )
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(width, hidden, generator=generator)
    head = Head.build(form, {}, generator, words=words)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return head.double(), words


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_words_are_scored_in_chunks_and_kept_for_no_gradient(chunk, monkeypatch):
    """A text may be longer than a chunk, and a chunk hold several; [n, V] is never there at once."""
    monkeypatch.setattr(heads, "CHUNK", chunk)
    monkeypatch.setattr(heads, "BLOCK", 4)
    again = []
    monkeypatch.setattr(
        heads, "checkpoint", lambda run, *given, **kw: again.append(given) or checkpoint(run, *given, **kw)
    )
    head, words = words_head()
    lengths = [4, 1, 7, 2]
    rows = torch.randn(14, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    head.layers[1].linear.words = [words.double().requires_grad_()]
    task = TaskSpec("sparse", width=11)
    found = head.read(rows, lengths, task)
    expected = torch.stack([head(part).relu().log1p().amax(0) for part in rows.split(lengths)])
    torch.testing.assert_close(found, expected)
    assert len(again) == -(-14 // chunk)
    inputs = [rows, *head.parameters(), *head.layers[1].linear.words]
    seed = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    with torch.inference_mode():
        torch.testing.assert_close(head.read(rows, lengths, task), expected)
    assert len(again) == -(-14 // chunk), "only gradients need scores twice"


def test_word_embeddings_are_the_encoder_s():
    head, words = words_head()
    assert head.layers[1].linear.words[0] is words
    sizes = {name: tensor.numel() for name, tensor in head.own_tensors().items()}
    assert sizes == {
        "transform.weight": 25,
        "transform.bias": 5,
        "norm.weight": 5,
        "norm.bias": 5,
        "decoder.bias": 11,
    }


def test_windows_of_a_text_give_each_word_its_largest_weight():
    encodings = [Encoding((1, 2), (0, 0), own=2), Encoding((3,), (0,), continues=True, own=1), Encoding((4,), (0,))]
    out = torch.stack([*ROWS, ROWS[0]])
    expected = torch.stack([torch.maximum(*ROWS), ROWS[0]])
    assert aggregate(out, encodings, TaskSpec("sparse", width=6, long="windows")).equal(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "sparse", "head": "linear"}, "head 'linear' does not fit sparse"),
        ({"kind": "regression", "width": 3}, "width 3 does not fit regression"),
        ({"kind": "multi-vector"}, "width 0 does not fit multi-vector"),
        ({"kind": "multi-vector", "width": 4, "max_terms": 2}, "max_terms 2 does not fit multi-vector"),
        ({"kind": "multi-vector", "width": 4, "long": "windows"}, "reads no text in windows"),
    ],
)
def test_what_makes_no_sense_is_said(values, message):
    with pytest.raises(SpecError, match=message):
        TaskSpec(**values)
