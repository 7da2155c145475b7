from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bertology_serve.errors import DataError
from bertology_serve.tasks.embedding import Embedding
from bertology_serve.tasks.spec import TaskSpec

TASK = Embedding(TaskSpec("embedding", max_length=16, pooling="mean", head="none"))


def test_a_text_is_one_sequence_and_a_pair_two(minilm):
    one = TASK.encode(TASK.example({"text": "good dog"}, "x:1", False), minilm)
    two = TASK.encode(TASK.example({"text": "good dog", "text_pair": "bad cat"}, "x:1", False), minilm)
    assert [list(encoding.ids) for encoding in one] == [minilm("good dog")["input_ids"]]
    assert [list(encoding.ids) for encoding in two] == minilm(["good dog", "bad cat"])["input_ids"]


def test_answer_has_unit_length_unless_told_otherwise():
    example = TASK.example({"text": "x"}, "x:1", False)
    row = torch.tensor([3.0, 4.0])
    assert TASK.decode(example, [], [row]) == {"embedding": pytest.approx([0.6, 0.8])}
    raw = Embedding(TaskSpec("embedding", head="none", normalize=False))
    assert raw.decode(example, [], [row]) == {"embedding": [3.0, 4.0]}
    pair = TASK.decode(example, [], [row, torch.tensor([4.0, 3.0])])
    assert pair["similarity"] == pytest.approx(0.96)
    assert pair["embedding_pair"] == pytest.approx([0.8, 0.6])


def cosent(first, second, labels):
    """CoSENT as sentence-transformers computes it, over a full matrix with a mask; scale 20."""
    scores = F.cosine_similarity(first, second) * 20
    scores = scores[:, None] - scores[None, :]
    ordered = (labels[:, None] < labels[None, :]).float()
    scores = scores - (1 - ordered) * 1e12
    return torch.logsumexp(torch.cat((torch.zeros(1), scores.view(-1))), dim=0)


def test_loss_is_cosent():
    torch.manual_seed(0)
    out, gold = torch.randn(10, 6), torch.tensor([0.0, 5.0, 2.5, 2.5, 1.0])
    loss = TASK.loss(out, [4] * 10, gold.tolist())
    torch.testing.assert_close(loss / TASK.weight(gold.tolist()), cosent(out[0::2], out[1::2], gold))


def test_loss_falls_when_the_order_is_right():
    text, near, far = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.1]), torch.tensor([0.0, 1.0])
    out = torch.stack([text, near, text, far])
    assert TASK.loss(out, [1] * 4, [5.0, 0.0]) < 1e-6 < 10 < TASK.loss(out, [1] * 4, [0.0, 5.0])
    assert TASK.loss(out[:2], [1] * 2, [5.0]) == 0.0


def test_training_needs_pairs():
    with pytest.raises(DataError, match=r"^x:2: field 'text_pair' is missing; embeddings are trained on scored pairs"):
        TASK.example({"text": "x", "score": 1}, "x:2", True)


def test_metrics():
    examples = [TASK.example({"text": "x", "text_pair": "y", "score": score}, "x:1", True) for score in (1, 2, 3)]
    found = TASK.metrics([{"similarity": value} for value in (0.1, 0.2, 0.9)], examples)
    assert found["spearman"] == pytest.approx(1.0)
    assert 0.9 < found["pearson"] < 1.0
    assert [TASK.target(example, []) for example in examples] == [1.0, 2.0, 3.0]
