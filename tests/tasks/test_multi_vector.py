from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bertology_serve.errors import DataError, Unsupported
from bertology_serve.tasks.contrastive import LOSSES, MaxSims, Target
from bertology_serve.tasks.multi_vector import MultiVector
from bertology_serve.tasks.spec import TaskSpec

TASK = MultiVector(TaskSpec("multi-vector", max_length=16, width=4))


def maxsim(query, document):
    """The definition, a loop over both."""
    query, document = F.normalize(query, dim=1), F.normalize(document, dim=1)
    return sum(max(float(row @ other) for other in document) for row in query)


def parts(lengths, seed=0):
    rows = torch.randn(sum(lengths), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows, rows.split(lengths)


def test_documents_have_no_vectors_for_punctuation_and_queries_have(minilm):
    example = TASK.example({"text": "good, dog!", "text_pair": "bad: cat."}, "x:1", False)
    query, document = TASK.encode(example, minilm)
    assert query.words == tuple(range(6))
    assert document.words == (0, 1, -1, 3, -1, 5)
    assert [list(one.ids) for one in (query, document)] == minilm(["good, dog!", "bad: cat."])["input_ids"]
    (alone,) = TASK.encode(TASK.example({"text": "good, dog!"}, "x:1", False), minilm)
    assert alone.words == (0, 1, -1, 3, -1, 5)
    (asked,) = TASK.encode(TASK.example({"text": "good?", "id": "q", "relevant": {"d": 1}}, "x:1", False), minilm)
    assert asked.words == tuple(range(4))
    for role, words in (("query", (0, 1, 2, 3)), ("document", (0, 1, -1, 3))):
        (one,) = TASK.encode(TASK.example({"text": "good?", "input_type": role}, "x:1", False), minilm)
        assert one.words == words
    with pytest.raises(
        DataError, match=r"^x:1: field 'input_type' is 'q' .*known: classification, .* document, passage, query"
    ):
        TASK.example({"text": "good?", "input_type": "q"}, "x:1", False)
    every = MultiVector(TaskSpec("multi-vector", max_length=16, width=4, skip_punctuation=False))
    assert every.encode(example, minilm)[1].words == tuple(range(6))


def test_a_text_has_vectors_of_unit_length_and_their_tokens(minilm):
    example = TASK.example({"text": "good dog."}, "x:1", False)
    (encoding,) = TASK.encode(example, minilm)
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    answer = TASK.decode(example, [encoding], [rows])
    assert answer["tokens"] == ["[CLS]", "good", "dog", "[SEP]"]
    np.testing.assert_allclose(answer["vectors"], F.normalize(rows[[0, 1, 2, 4]], dim=1), rtol=1e-6)


def test_a_pair_is_alike_by_maxsim(minilm):
    example = TASK.example({"text": "good dog", "positive": "a cat.", "negative": "bad, bad"}, "x:1", False)
    encodings = TASK.encode(example, minilm)
    own = parts([len(one) for one in encodings])[1]
    answer = TASK.decode(example, encodings, list(own))
    assert answer["similarity"] == pytest.approx(maxsim(own[0], own[1][[0, 1, 2, 4]]))
    assert [len(vectors) for vectors in (answer["vectors_pair"], *answer["vectors_negatives"])] == [4, 4]
    found = TASK.searching([answer["vectors_pair"], *answer["vectors_negatives"]])(answer["vectors"])
    assert found == pytest.approx([maxsim(own[0], own[1][[0, 1, 2, 4]]), maxsim(own[0], own[2][[0, 1, 3, 4]])])


def test_the_table_is_maxsim_of_every_query_and_document():
    lengths = [3, 5, 1, 4]
    rows, own = parts(lengths)
    alike, numbers = MaxSims(rows, lengths), torch.arange(4)
    expected = torch.tensor([[maxsim(one, other) for other in own] for one in own], dtype=torch.float64)
    torch.testing.assert_close(alike.table(numbers, numbers), expected)
    torch.testing.assert_close(alike.pairs(numbers, numbers.flip(0)), expected.flip(1).diagonal())


def test_the_loss_leaves_out_what_has_no_vector(minilm):
    records = [{"anchor": "good, dog", "positive": "a cat."}, {"anchor": "bad", "positive": "who: Ada"}]
    examples = [TASK.example(record, "x:1", True) for record in records]
    encodings = [TASK.encode(example, minilm) for example in examples]
    targets = [TASK.target(*pair) for pair in zip(examples, encodings, strict=True)]
    lengths = [len(one) for own in encodings for one in own]
    rows, own = parts(lengths)
    kept = [own[0], own[1][[0, 1, 2, 4]], own[2], own[3][[0, 1, 3, 4]]]
    table = torch.tensor([[maxsim(one, other) for other in kept[1::2]] for one in kept[0::2]], dtype=torch.float64)
    expected = F.cross_entropy(table, torch.arange(2))
    aimed = TASK.aimed(examples, targets, "auto")
    assert [(target.loss, target.skipped) for target in aimed] == [("mnrl", (8,)), ("mnrl", (5,))]
    torch.testing.assert_close(TASK.loss(rows, lengths, aimed), 2 * expected)


def test_a_teacher_s_scores_are_those_of_maxsim():
    lengths, scores = [2, 3, 4], (1.0, 0.5)
    rows, own = parts(lengths)
    target = [Target((0, 1, 2), scores=scores)]
    found = torch.tensor([maxsim(own[0], other) for other in own[1:]], dtype=torch.float64)
    margin = (found[0] - found[1] - 0.5) ** 2
    torch.testing.assert_close(LOSSES["margin-mse"](MaxSims(rows, lengths), target), margin)
    apart = F.kl_div(found.log_softmax(0), torch.tensor(scores).double().softmax(0), reduction="sum")
    torch.testing.assert_close(LOSSES["distill"](MaxSims(rows, lengths), target), apart)


def test_punctuation_alone_keeps_its_vectors(minilm):
    task = MultiVector(TaskSpec("multi-vector", max_length=16, width=4))
    task.encode(task.example({"text": "a"}, "x:1", False), minilm)
    task.punctuation = frozenset(minilm("...")["input_ids"])
    (encoding,) = task.encode(task.example({"text": "..."}, "x:1", False), minilm)
    assert min(encoding.words) >= 0


def test_prompts_stand_before_queries_and_documents(minilm):
    task = MultiVector(replace(TASK.spec, prompts=(("query", "ask "), ("document", "say "))))
    query, document = task.encode(task.example({"text": "good", "text_pair": "bad"}, "x:1", False), minilm)
    assert [list(one.ids) for one in (query, document)] == minilm(["ask good", "say bad"])["input_ids"]
    (alone,) = task.encode(task.example({"text": "good!", "input_type": "search_query"}, "x:1", False), minilm)
    assert list(alone.ids) == minilm("ask good!")["input_ids"]
    assert min(alone.words) >= 0, "a query has a vector for every token"
    with pytest.raises(Unsupported, match="field 'dimensions' is not supported for multi-vector"):
        task.example({"text": "good", "dimensions": 8}, "x:1", False)
    with pytest.raises(Unsupported, match="field 'pooling' is not supported for multi-vector"):
        task.example({"text": "good", "pooling": "chunks", "chunk_tokens": 3}, "x:1", False)
