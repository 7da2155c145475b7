"""A text beyond ``max_length`` read in windows: what comes of them is what can be computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Prediction, Request
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import SpecError
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.encoding import encode_text
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny

LABELS = ("bad", "good", "none")
LENGTH, STRIDE = 14, 4  # twelve words a window
WORDS = [word.lower() for word in tiny.WORDS[:-4]]
LONG = [WORDS[(7 * i) % len(WORDS)] for i in range(31)]
# by hand: each word in one window, the overlaps of four divided in their middle
EXTENTS, OWN = ((0, 12), (8, 20), (16, 28), (24, 31)), (10, 8, 8, 5)
WINDOWS = [" ".join(LONG[left:right]) for left, right in EXTENTS]
TEXT = " ".join(LONG)


def task(kind: str = "classification", long: str = "windows", **more: Any) -> TaskSpec:
    labels = LABELS if kind in ("classification", "multi-label") else ()
    return TaskSpec(kind, labels, max_length=LENGTH, stride=STRIDE, long=long, **more)


def test_the_extents_are_those_of_the_definition():
    assert sum(OWN) == len(LONG)
    assert len({len(window.split()) for window in WINDOWS[:-1]}) == 1


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def encoder(path: str) -> Encoder:
    return Encoder.load(path)


def exactly(path: str, encoder: Encoder, delta: Delta, text: str) -> Tensor:
    """The pooled row of a text, and a linear head's output where there is one, by transformers in float64."""
    model = AutoModel.from_pretrained(path).double().eval()
    with torch.no_grad():
        rows = model(**encoder.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        row = {"mean": rows.mean(0), "cls": rows[0], "max": rows.amax(0)}[delta.task.pooling]
        if delta.task.head == "none":
            return row
        weight, bias = (delta.head[f"classifier.{name}"].double() for name in ("weight", "bias"))
        return F.linear(row, weight, bias)


def ask(encoder: Encoder, delta: Delta, *texts: str, **fields: Any) -> list[Prediction]:
    pipeline = Pipeline(encoder, [delta])
    return pipeline.answer([Request(delta.name, {"text": text, **fields}, logits=True) for text in texts])


@pytest.mark.parametrize("aggregate", ["mean", "max"])
@pytest.mark.parametrize("kind", ["classification", "multi-label", "regression", "embedding"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_a_long_text_is_the_aggregate_of_its_windows(path, encoder, kind, pooling, aggregate):
    head = "none" if kind == "embedding" else "linear"
    delta = tiny.delta(encoder, "it", [], task(kind, pooling=pooling, head=head, aggregate=aggregate), size=0.5)
    rows = torch.stack([exactly(path, encoder, delta, window) for window in WINDOWS])
    rows = F.normalize(rows) if kind == "embedding" else rows
    weights = torch.tensor(OWN, dtype=torch.float64)
    expected = rows.amax(0) if aggregate == "max" else (weights @ rows) / len(LONG)
    short, found = ask(encoder, delta, WINDOWS[0], TEXT)
    assert torch.tensor(found.answer["logits"]).double().allclose(expected, atol=1e-5)
    assert (found.windows, found.truncated) == (4, False)
    assert found.as_dict()["windows"] == 4
    assert found.tokens_read == sum(right - left + 2 for left, right in EXTENTS)
    assert "windows" not in short.as_dict()
    if kind == "classification":
        assert list(found.answer["scores"].values()) == pytest.approx(expected.softmax(0).tolist(), abs=1e-6)
    if kind == "multi-label":
        assert list(found.answer["scores"].values()) == pytest.approx(expected.sigmoid().tolist(), abs=1e-6)
    if kind == "regression":
        assert found.answer["value"] == pytest.approx(float(expected), abs=1e-5)
    if kind == "embedding":
        assert found.answer["embedding"] == pytest.approx(F.normalize(expected, dim=0).tolist(), abs=1e-6)


@pytest.mark.parametrize("kind", ["classification", "multi-label", "regression", "embedding", "multiple-choice"])
def test_what_fits_is_answered_as_ever(encoder, kind):
    form = {"head": "none", "pooling": "mean"} if kind == "embedding" else {}
    fields = {"choices": WINDOWS[-1:] * 2, "premise": "the cat"} if kind == "multiple-choice" else {}
    found = []
    for long in ("cut", "windows"):
        delta = tiny.delta(encoder, "it", [Lora(rank=2)], task(kind, long, **form))
        found.append([one.as_dict() for one in ask(encoder, delta, *WINDOWS, "the cat", **fields)])
    assert found[0] == found[1]


@pytest.mark.parametrize("kinds", [[Lora(rank=2)], [Adapter(width=3)]])
@pytest.mark.parametrize("head", ["hf", "linear"])
def test_a_trained_delta_says_of_the_whole_what_it_says_of_the_windows(encoder, kinds, head):
    cut, whole = (tiny.delta(encoder, "it", kinds, task(long=long, head=head), 1, 0.5) for long in ("cut", "windows"))
    rows = torch.tensor([one.answer["logits"] for one in ask(encoder, cut, *WINDOWS)], dtype=torch.float64)
    (found,) = ask(encoder, whole, TEXT)
    expected = torch.tensor(OWN, dtype=torch.float64) @ rows / len(LONG)
    assert torch.tensor(found.answer["logits"]).double().allclose(expected, atol=1e-5)


def test_of_a_pair_the_longer_text_is_read_in_windows(encoder):
    cut, whole = (tiny.delta(encoder, "it", [], task(long=long)) for long in ("cut", "windows"))
    pair, size = "the cat", LENGTH - 3 - 2
    extents = [(left, min(left + size, 31)) for left in range(0, 31 - size + 4, size - STRIDE)]
    rows = [ask(encoder, cut, " ".join(LONG[a:b]), text_pair=pair)[0].answer["logits"] for a, b in extents]
    own = torch.tensor([7.0, *[5.0] * (len(extents) - 2), 31 - 7 - 5 * (len(extents) - 2)], dtype=torch.float64)
    for text, other, swapped in ((TEXT, pair, False), (pair, TEXT, True)):
        (found,) = ask(encoder, whole, text, text_pair=other)
        assert (found.windows, found.truncated) == (len(extents), False)
        if not swapped:
            expected = own @ torch.tensor(rows, dtype=torch.float64) / 31
            assert torch.tensor(found.answer["logits"]).double().allclose(expected, atol=1e-5)


def test_both_texts_of_an_embedded_pair_have_windows_of_their_own(encoder):
    delta = tiny.delta(encoder, "it", [], task("embedding", head="none", pooling="mean"))
    (pair,) = ask(encoder, delta, TEXT, text_pair=WINDOWS[2] + " " + TEXT)
    alone = [one.answer["embedding"] for one in ask(encoder, delta, TEXT, WINDOWS[2] + " " + TEXT)]
    assert pair.answer["embedding"] == pytest.approx(alone[0], abs=1e-5)
    assert pair.answer["embedding_pair"] == pytest.approx(alone[1], abs=1e-5)
    assert pair.answer["embedding"] != pytest.approx(alone[1], abs=1e-2)


def test_a_long_premise_is_read_in_windows_beside_every_choice(encoder):
    cut, whole = (tiny.delta(encoder, "it", [], task("multiple-choice", long)) for long in ("cut", "windows"))
    size, choices = LENGTH - 3 - 2, ["the cat", "a dog"]
    extents = [(left, min(left + size, 31)) for left in range(0, 31 - size + 4, size - STRIDE)]
    own = torch.tensor([7.0, *[5.0] * (len(extents) - 2), 31 - 7 - 5 * (len(extents) - 2)], dtype=torch.float64)
    rows = [ask(encoder, cut, "", premise=" ".join(LONG[a:b]), choices=choices)[0].answer["logits"] for a, b in extents]
    (found,) = ask(encoder, whole, "", premise=TEXT, choices=choices)
    expected = (own @ torch.tensor(rows, dtype=torch.float64)[..., 0] / 31).softmax(0)
    assert found.answer["scores"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_windows_of_many_deltas_share_a_batch(encoder):
    """Mixed with others each text has the answer that it has alone."""
    deltas = [
        tiny.delta(encoder, "a", [Lora(rank=2)], task(), 1),
        tiny.delta(encoder, "b", [Adapter(width=3)], task("embedding", head="none", pooling="mean"), 2),
        tiny.delta(encoder, "c", [], task("regression", "cut"), 3),
    ]
    pipeline = Pipeline(encoder, deltas)
    texts = (TEXT, "the cat", TEXT + " " + TEXT)
    requests = [Request(delta.name, {"text": text}, logits=True) for text in texts for delta in deltas]
    together = pipeline.run([pipeline.prepare(request) for request in requests])
    for request, one in zip(requests, together, strict=True):
        (alone,) = pipeline.answer([request])
        assert one.windows == alone.windows
        assert torch.tensor(one.answer["logits"]).allclose(torch.tensor(alone.answer["logits"]), atol=1e-5)


NAMES = {"ada": "B-PER", "dog": "I-PER", "paris": "B-LOC", "london": "B-LOC"}
SENTENCES = [
    "Ada dog went to Paris .",
    "the cat was in the house",
    "Ada met a dog in London , Paris .",
    "Ada dog dog .",
]


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Delta]:
    """An encoder with next to no attention and positions, and a head that knows each word's tag."""
    path = tiny.save("bert", tmp_path_factory.mktemp("tagger"))
    model = AutoModel.from_pretrained(path).eval()
    known = sorted({word.lower() for sentence in SENTENCES for word in sentence.split()})
    tags = ("O", "B-PER", "I-PER", "B-LOC")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.output.dense" in name or "position_embeddings" in name:
                parameter.mul_(0.01)
        words = tiny.tokenizer()(" ".join(known), return_tensors="pt")
        rows = model(**words).last_hidden_state[0, 1:-1]
    model.save_pretrained(path)
    gold = torch.tensor([[8.0 * (NAMES.get(word, "O") == tag) for tag in tags] for word in known])
    solved = torch.linalg.lstsq(F.pad(rows, (0, 1), value=1.0), gold).solution
    encoder = Encoder.load(path)
    spec = TaskSpec("token-classification", tags, max_length=LENGTH, head="linear", stride=3, long="windows")
    made = tiny.delta(encoder, "names", [], spec)
    head = {"classifier.weight": solved[:-1].T.contiguous(), "classifier.bias": solved[-1].clone()}
    return encoder, replace(made, head=head)


def entities(encoder: Encoder, delta: Delta, record: dict[str, Any]) -> list[tuple[Any, ...]]:
    (found,) = Pipeline(encoder, [delta]).answer([Request(delta.name, record)])
    return [(one["label"], one["start"], one["end"], one["text"]) for one in found.answer["entities"]]


@pytest.mark.parametrize("stride", [0, 1, 3, 6, 20])
def test_entities_of_a_long_text_are_those_of_its_sentences(tagger, stride):
    """With offsets in the whole text, and none lost or cut where windows end, wherever that is."""
    encoder, delta = tagger
    delta = replace(delta, task=replace(delta.task, stride=stride))
    for shift in range(6):
        sentences, at, expected = ["the house ."] * shift + SENTENCES * 3, 0, []
        for sentence in sentences:
            found = entities(encoder, delta, {"text": sentence})
            expected += [(label, start + at, end + at, text) for label, start, end, text in found]
            at += len(sentence) + 1
        text = " ".join(sentences)
        assert len(expected) == 3 * 7
        assert entities(encoder, delta, {"text": text}) == expected
        assert entities(encoder, delta, {"tokens": text.split()}) == expected


def test_entities_behind_the_cut_are_lost_without_windows(tagger):
    encoder, delta = tagger
    delta = replace(delta, task=replace(delta.task, long="cut"))
    (found,) = Pipeline(encoder, [delta]).answer([Request(delta.name, {"text": " ".join(SENTENCES)})])
    assert found.truncated
    assert max(one["end"] for one in found.answer["entities"]) < len(" ".join(SENTENCES[:3]))


def test_words_teach_once_each(encoder):
    """The target of a long text names each word's tag in one window, and the loss is that of the words."""
    spec = TaskSpec("token-classification", ("O", "B-X"), max_length=LENGTH, stride=STRIDE, long="windows")
    live = TrainableDelta(encoder, [], spec).eval()
    one = task_for(spec)
    tags = ["B-X" if i % 3 else "O" for i in range(len(LONG))]
    example = one.example({"tokens": LONG, "tags": tags}, "x:1", True)
    encodings = one.encode(example, encoder.tokenizer)
    target = one.target(example, encodings)
    assert [spec.labels[index] for index in target if index >= 0] == tags
    assert one.weight([target]) == len(LONG)
    out = live(encodings)
    kept = [row for row, index in enumerate(target) if index >= 0]
    gold = torch.tensor([spec.labels.index(tag) for tag in tags])
    expected = F.cross_entropy(out[kept].double(), gold, reduction="sum")
    assert one.loss(out, [len(own) for own in encodings], [target]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_is_that_of_the_aggregate(encoder):
    """Gradients reach the windows as they do by hand."""
    spec = task(head="linear", pooling="mean")
    live, one = TrainableDelta(encoder, [Lora(rank=2)], spec).eval(), task_for(spec)
    with torch.no_grad():
        live.tensors["lora-query-b"].normal_(generator=torch.Generator().manual_seed(0))
    weight = live.head.layers[0].linear.weight
    with torch.no_grad():
        weight.normal_(generator=torch.Generator().manual_seed(0))
    example = one.example({"text": TEXT, "label": "good"}, "x:1", True)
    loss = one.loss(live(one.encode(example, encoder.tokenizer)), [], [one.target(example, ())])
    windows = [encode_text(encoder.tokenizer, window, None, LENGTH) for window in WINDOWS]
    by_hand = torch.tensor(OWN) / len(LONG) @ live(windows)
    expected = -by_hand.log_softmax(0)[1]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter in (weight, live.tensors["lora-query-a"]):
        (found,), (other,) = (torch.autograd.grad(value, parameter, retain_graph=True) for value in (loss, expected))
        assert found.allclose(other, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"long": "scroll"}, "unknown long 'scroll'"),
        ({"aggregate": "sum"}, "unknown aggregate 'sum'"),
        ({"aggregate": "max"}, "aggregate 'max' is for windows"),
        ({"long": "windows", "max_length": 7}, "max_length is 7; windows need at least 8"),
        ({"kind": "question-answering", "labels": (), "long": "windows"}, "reads windows anyway"),
        ({"kind": "token-classification", "long": "windows", "aggregate": "max"}, "aggregate 'max' is for windows"),
    ],
)
def test_what_does_not_fit_is_refused(fields, problem):
    with pytest.raises(SpecError, match=problem):
        TaskSpec(**{"kind": "classification", "labels": LABELS, **fields})
