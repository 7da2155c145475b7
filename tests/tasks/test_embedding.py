from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score
from torch.nn import functional as F

from bertology_serve.errors import DataError, SpecError
from bertology_serve.tasks.contrastive import LOSSES, Cosines, Target
from bertology_serve.tasks.embedding import Embedding, prompts_for
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


def scored(*scores):
    """Targets of pairs of their own texts."""
    return [Target((2 * i, 2 * i + 1), score) for i, score in enumerate(scores)]


def test_loss_is_cosent():
    torch.manual_seed(0)
    out, gold = torch.randn(10, 6), torch.tensor([0.0, 5.0, 2.5, 2.5, 1.0])
    targets = scored(*gold.tolist())
    loss = TASK.loss(out, [4] * 10, targets)
    torch.testing.assert_close(loss / TASK.weight(targets), cosent(out[0::2], out[1::2], gold))


def test_loss_falls_when_the_order_is_right():
    text, near, far = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.1]), torch.tensor([0.0, 1.0])
    out = torch.stack([text, near, text, far])
    assert TASK.loss(out, [1] * 4, scored(5.0, 0.0)) < 1e-6 < 10 < TASK.loss(out, [1] * 4, scored(0.0, 5.0))
    assert TASK.loss(out[:2], [1] * 2, scored(5.0)) == 0.0


def parted(negatives, seed=0):
    """Rows in float64 of eight anchors with a pair and so many negatives each, together and column by column."""
    columns = torch.randn(2 + negatives, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return columns.transpose(0, 1).reshape(-1, 6), columns


def targets_of(negatives, **values):
    width = 2 + negatives
    return [Target(tuple(range(i * width, (i + 1) * width)), **values) for i in range(8)]


def cosines(a, b):
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_mnrl_is_that_of_sentence_transformers(negatives):
    """Its MultipleNegativesRankingLoss: cross-entropy over the columns of candidates, scale 20."""
    rows, columns = parted(negatives)
    scores, own = 20 * cosines(columns[0], torch.cat([*columns[1:]])), torch.arange(8)
    found = LOSSES["mnrl"](Cosines(rows), targets_of(negatives))
    torch.testing.assert_close(found, F.cross_entropy(scores, own), rtol=1e-12, atol=0)
    both = (F.cross_entropy(scores, own) + F.cross_entropy(scores[:, :8].T, own)) / 2
    torch.testing.assert_close(LOSSES["mnrl-symmetric"](Cosines(rows), targets_of(negatives)), both, rtol=1e-12, atol=0)


def test_what_belongs_to_the_anchor_is_no_negative():
    rows, columns = parted(0)
    same = [Target((0, 1)), Target((0, 2)), Target((3, 4)), Target((5, 4)), *targets_of(0)[4:]]
    scores = 20 * cosines(columns[0], columns[1])
    for i, j in ((0, 1), (1, 0), (2, 3), (3, 2)):  # the same anchor; the same pair
        scores[i, j] = -torch.inf
    expected = F.cross_entropy(scores, torch.arange(8))
    torch.testing.assert_close(LOSSES["mnrl"](Cosines(rows), same), expected, rtol=1e-12, atol=0)


def test_ragged_negatives_are_candidates_of_all():
    rows = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = LOSSES["mnrl"](Cosines(rows), [Target((0, 1, 2, 3)), Target((4, 5, 6))])
    expected = F.cross_entropy(20 * cosines(rows[[0, 4]], rows[[1, 2, 3, 5, 6]]), torch.tensor([0, 3]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_teacher_s_scores_are_learnt():
    rows, columns = parted(2)
    scores = (3.0, 1.0, -2.5)
    targets = targets_of(2, scores=scores)
    own = 20 * torch.stack([F.cosine_similarity(columns[0], column) for column in columns[1:]], 1)
    gold = torch.tensor([scores], dtype=torch.float64).expand(8, 3)
    margins = F.mse_loss(own[:, :1] - own[:, 1:], gold[:, :1] - gold[:, 1:])
    torch.testing.assert_close(LOSSES["margin-mse"](Cosines(rows), targets), margins, rtol=1e-12, atol=0)
    apart = F.kl_div(own.log_softmax(1), gold.softmax(1), reduction="batchmean")
    torch.testing.assert_close(LOSSES["distill"](Cosines(rows), targets), apart, rtol=1e-12, atol=0)
    rows, columns = parted(0)
    cosine = F.mse_loss(F.cosine_similarity(*columns), torch.full((8,), 0.7, dtype=torch.float64))
    torch.testing.assert_close(LOSSES["distill"](Cosines(rows), targets_of(0, score=0.7)), cosine, rtol=1e-12, atol=0)


def test_matryoshka_sums_the_loss_over_widths():
    rows, targets = parted(1)[0], targets_of(1)
    task = Embedding(replace(TASK.spec, dimensions=(6, 4, 2)))
    expected = sum(LOSSES["mnrl"](Cosines(rows[:, :width]), targets) for width in (6, 4, 2)) * 8
    torch.testing.assert_close(task.loss(rows, [], targets), expected, rtol=1e-12, atol=0)
    examples = [TASK.example(scored_record(score), "x:1", True) for score in (1, 2, 3)]
    made = [
        {"embedding": [1.0, 0.0], "embedding_pair": [a, b], "similarity": 0.5} for a, b in ((1, 1), (-1, 0), (2, 1))
    ]
    found = Embedding(replace(TASK.spec, dimensions=(2, 1))).metrics(made, examples)
    assert list(found) == ["spearman", "pearson", "spearman_2", "spearman_1"]
    assert found["spearman_2"] == pytest.approx(0.5)


def scored_record(score):
    return {"text": "x", "text_pair": "y", "score": score}


def aimed(examples, loss):
    return TASK.aimed(examples, [TASK.target(example, ()) for example in examples], loss)


def test_training_needs_pairs():
    with pytest.raises(
        DataError, match=r"^x:2: field 'text_pair' \(or 'positive'\) is missing; embeddings are trained"
    ):
        TASK.example({"text": "x", "score": 1}, "x:2", True)
    document = TASK.example({"text": "x", "id": "d1"}, "x:3", True)
    with pytest.raises(DataError, match=r"^x:3: field 'text_pair' \(or 'positive'\) is missing; expected pairs"):
        aimed([document], "mnrl")


SHAPES = [
    ({"text": "a", "text_pair": "b", "score": 3}, "cosent"),
    ({"sentence": "a", "anchor": "a", "positive": "b", "label": 0.5}, "cosent"),
    ({"anchor": "a", "positive": "b"}, "mnrl"),
    ({"anchor": "a", "positive": "b", "negative": "c"}, "mnrl"),
    ({"text": "a", "positive": "b", "negatives": ["c", "d"], "negative_1": "e"}, "mnrl"),
    ({"text": "a", "positive": "b", "negative": "c", "score": 4}, "margin-mse"),
    ({"text": "a", "positive": "b", "negatives": ["c", "d"], "scores": [9, 1, -2]}, "margin-mse"),
]


@pytest.mark.parametrize(("record", "loss"), SHAPES)
def test_the_shape_of_a_record_decides_the_loss(record, loss, minilm):
    example = TASK.example(record, "x:1", True)
    assert [target.loss for target in aimed([example], "auto")] == [loss]
    texts = [value for name, value in record.items() if name in ("anchor", "text", "positive", "text_pair", "negative")]
    texts += [*record.get("negatives", ()), *([record["negative_1"]] if "negative_1" in record else [])]
    assert list(example.texts) == texts
    assert len(TASK.encode(example, minilm)) == len(texts)
    assert TASK.example(record, "x:1", False).texts == example.texts, "negatives are embedded, gold or not"


BAD = [
    ({"text": "a", "negative": "c"}, "auto", "there are negatives, and field 'positive'"),
    ({"text": "a", "positive": ""}, "auto", "field 'positive' is empty"),
    ({"text": "a", "text_pair": "b", "positive": "c"}, "auto", "'text_pair' and 'positive' mean the same"),
    ({"text": "a", "positive": "b", "negatives": ["c", ""]}, "auto", r"field 'negatives\[1\]' is empty"),
    ({"text": "a", "positive": "b", "negatives": 3}, "auto", r"field 'negatives' is 3 \(int\); expected a list"),
    ({"text": "a", "positive": "b", "negatives": ["c"], "scores": [1]}, "auto", "'scores' has 1 numbers; expected one"),
    (
        {"text": "a", "positive": "b", "negatives": ["c"], "scores": [1, "x"]},
        "auto",
        r"scores\[1\]: field 'score' is 'x'",
    ),
    ({"text": "a", "positive": "b", "negatives": ["c", "d"], "score": 1}, "auto", "field 'score' beside 2 negatives"),
    ({"text": "a", "positive": "b"}, "cosent", "field 'score' is missing; loss cosent needs it"),
    ({"text": "a", "positive": "b"}, "distill", r"'scores' \(of a pair, 'score'\) is missing; loss distill needs it"),
    ({"text": "a", "positive": "b", "negative": "c"}, "margin-mse", "field 'scores' is missing, or there are no"),
    ({"text": "a", "positive": "b", "score": 1}, "mnrl", "field 'score' is there, and loss mnrl takes every pair"),
    ({"text": "a", "id": 1, "relevant": []}, "auto", "field 'relevant' is .*; expected grades by ids"),
    ({"text": "a", "id": 1, "relevant": {"d": "x"}}, "auto", "relevant.'d'.: field 'score' is 'x'"),
]


@pytest.mark.parametrize(("record", "loss", "message"), BAD)
def test_what_cannot_be_learnt_is_said(record, loss, message):
    with pytest.raises(DataError, match=f"^x:1:.*{message}"):
        aimed([TASK.example(record, "x:1", True)], loss)


def test_the_first_record_decides_for_all():
    examples = [TASK.example(record, f"x:{i}", True) for i, (record, _) in enumerate(SHAPES[1:3], 1)]
    with pytest.raises(DataError, match=r"^x:2: field 'score' is missing; loss cosent needs it"):
        aimed(examples, "auto")
    with pytest.raises(DataError, match=r"^x:2: field 'score' is missing; the first record has one"):
        TASK.metrics([{"similarity": 1.0}] * 2, examples)


def test_a_retrieval_set_is_measured_as_trec_eval_does():
    rng = np.random.default_rng(0)
    documents, queries = rng.normal(size=(30, 4)), rng.normal(size=(5, 4))
    grades = rng.integers(0, 3, size=(5, 30)) * (rng.random((5, 30)) < 0.3)
    grades[:, 0] = 1
    records = [{"id": f"d{i}", "text": "x"} for i in range(30)]
    records += [
        {"id": f"q{i}", "text": "x", "relevant": {f"d{j}": int(g) for j, g in enumerate(row) if g}}
        for i, row in enumerate(grades)
    ]
    examples = [TASK.example(json.loads(json.dumps(one)), f"x:{i}", True) for i, one in enumerate(records)]
    answers = [{"embedding": row.tolist()} for row in (*documents, *queries)]
    found = TASK.metrics(answers, examples)
    table = cosines(torch.from_numpy(queries), torch.from_numpy(documents)).numpy()
    assert found["ndcg@10"] == pytest.approx(ndcg_score(grades, table, k=10), abs=1e-12)
    for name, value in by_hand(table, grades).items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    parts, quality = TASK.parts(answers, examples), TASK.quality(answers, examples)
    assert TASK.main(parts) == pytest.approx(found["ndcg@10"])
    assert quality[:30].tolist() == [1.0] * 30
    assert quality[30:].tolist() == parts[:, 0].tolist()
    with pytest.raises(DataError, match=r"^x:0: there are 0 queries and 30 documents; expected both"):
        TASK.metrics(answers[:30], examples[:30])


def by_hand(table, grades):
    """Reciprocal rank, average precision and recall by their definitions, a loop each."""
    found = {"mrr@10": [], "map": [], "recall@1": [], "recall@10": []}
    for scores, gold in zip(table, grades, strict=True):
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        right = [place for place, i in enumerate(order, 1) if gold[i] > 0]
        found["mrr@10"].append(next((1 / place for place in right if place <= 10), 0.0))
        found["map"].append(sum(sum(p <= place for p in right) / place for place in right) / len(right))
        for k in (1, 10):
            found[f"recall@{k}"].append(sum(place <= k for place in right) / len(right))
    return {name: np.mean(values) for name, values in found.items()}


def test_pairs_without_scores_search_each_other():
    """Two anchors are the same and have two positives; the negative is a document too, and nearer than a positive."""
    rows = [("a", "p", [1.0, 0.0], [1.0, 0.1], None), ("a", "q", [1.0, 0.0], [0.0, 1.0], None),
            ("b", "r", [0.0, 1.0], [0.1, 1.0], [1.0, 1.0])]  # fmt: skip
    examples, answers = [], []
    for text, pair, one, other, negative in rows:
        record = {"anchor": text, "positive": pair} | ({"negative": "n"} if negative else {})
        examples.append(TASK.example(record, "x:1", True))
        outputs = [torch.tensor(row) for row in (one, other, negative) if row]
        answers.append(TASK.decode(examples[-1], [], outputs))
    found = TASK.metrics(answers, examples)
    # a: p, n, r, q; b: q, r, n, p
    assert found["mrr@10"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["map"] == pytest.approx(((1 + 2 / 4) / 2 + 1 / 2) / 2)
    assert found["recall@1"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["triplet_accuracy"] == 1.0
    assert len(TASK.parts(answers, examples)) == 2
    assert len(TASK.quality(answers, examples)) == 3


def test_metrics():
    examples = [TASK.example({"text": "x", "text_pair": "y", "score": score}, "x:1", True) for score in (1, 2, 3)]
    found = TASK.metrics([{"similarity": value} for value in (0.1, 0.2, 0.9)], examples)
    assert found["spearman"] == pytest.approx(1.0)
    assert 0.9 < found["pearson"] < 1.0
    assert [TASK.target(example, []).score for example in examples] == [1.0, 2.0, 3.0]


PROMPTS = (("query", "the question ? "), ("passage", "the text . "), ("sts", "alike ? "))


def test_prompts_stand_before_texts_by_their_role(minilm):
    task = Embedding(TaskSpec("embedding", max_length=32, head="none", prompts=PROMPTS))

    def read(labelled=False, **record):
        return [minilm.decode(one.ids[1:-1]) for one in task.encode(task.example(record, "x:1", labelled), minilm)]

    assert read(text="a dog") == ["a dog"], "no role, and no prompt before all texts"
    assert read(text="a dog", input_type="search_query") == ["the question? a dog"]
    assert read(text="a dog", input_type="document") == ["the text. a dog"]
    assert read(text="a dog", input_type="clustering") == ["a dog"], "a role without a prompt"
    assert read(text="a dog", prompt_name="sts") == read(text="a dog", input_type="sts") == ["alike? a dog"]
    pair = ["the question? a dog", "the text. a cat"]
    assert read(text="a dog", text_pair="a cat") == pair
    assert read(text="a dog", text_pair="a cat", input_type="query")[1] == "the question? a cat"
    record = {"anchor": "a dog", "positive": "a cat", "negatives": ["a bird"]}
    assert read(labelled=True, **record) == [*pair, "the text. a bird"]
    assert read(labelled=True, text="a dog", id="q", relevant={"d": 1}) == pair[:1]
    assert read(labelled=True, text="a cat", id="d") == pair[1:]
    always = Embedding(replace(task.spec, prompts=(("", "say : "), ("query", "ask : "))))
    assert prompts_for(always.spec, {}, "x:1") == ("say : ", "say : ")
    assert prompts_for(always.spec, {}, "x:1", paired=True) == ("ask : ", "say : ")


def test_prompts_that_are_not_there_are_named():
    task = Embedding(TaskSpec("embedding", max_length=32, head="none", prompts=PROMPTS))
    with pytest.raises(DataError, match=r"x:1: field 'prompt_name' is 'doc' .*prompts for passage, query, sts"):
        task.example({"text": "a", "prompt_name": "doc"}, "x:1", False)
    with pytest.raises(DataError, match=r"x:1: field 'input_type' is 'queries' .*did you mean 'query'"):
        task.example({"text": "a", "input_type": "queries"}, "x:1", False)
    with pytest.raises(DataError, match="this delta has no prompts"):
        TASK.example({"text": "a", "prompt_name": "query"}, "x:1", False)
    assert TASK.example({"text": "a", "input_type": "query"}, "x:1", False).prompts == ("", "")


@pytest.mark.parametrize(
    ("kind", "prompts", "message"),
    [
        ("regression", PROMPTS, "prompts do not fit regression"),
        ("embedding", (("a", "x"), ("a", "y")), "there are 2 prompts .* each name once"),
        ("embedding", tuple((str(i), "x") for i in range(65)), "there are 65 prompts"),
        ("embedding", (("a", "x" * 2001),), "of at most 2001 characters"),
    ],
)
def test_prompts_have_bounds(kind, prompts, message):
    with pytest.raises(SpecError, match=message):
        TaskSpec(kind, head="none" if kind == "embedding" else "hf", prompts=prompts)
