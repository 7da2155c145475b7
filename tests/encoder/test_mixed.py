"""A mixed batch gives every sequence the answer that it gets alone, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.linear import available
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.norms import Norms
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.kinds.vera import Vera
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny

LABELS = ("bad", "good", "none")
CLASSES = TaskSpec("classification", LABELS, 32)
TAGS = TaskSpec("token-classification", ("O", "B-LOC", "I-LOC", "B-PER", "I-PER"), 32)
ANSWERS = TaskSpec("question-answering", max_length=24, stride=4)
# name -> (components, task): five kinds, four ranks, every task, kinds combined
DELTAS: dict[str, tuple[list[Any], TaskSpec]] = {
    "lora-1": ([Lora(rank=1)], CLASSES),
    "lora-4": ([Lora(("query", "key", "value", "output", "up", "down"), rank=4)], TAGS),
    "lora-8": ([Lora(("key", "value"), rank=8, rslora=True)], ANSWERS),
    "lora-3": ([Lora(("query",), rank=3, layers=(1,))], TaskSpec("regression", max_length=32, pooling="mean")),
    "flags": ([Lora(rank=2)], TaskSpec("multi-label", LABELS, 32, thresholds=(0.4, 0.5, 0.6))),
    "bitfit": ([Bitfit()], CLASSES),
    "bitfit-qkv": ([Bitfit("attention")], TaskSpec("multiple-choice", max_length=32)),
    "bitfit-upper": ([Bitfit(layers=(1, 2))], CLASSES),
    "houlsby": ([Adapter(width=5)], CLASSES),
    "pfeiffer": ([Adapter("pfeiffer", width=7, drop_lowest=1)], TAGS),
    "prompt": ([Prompt(3)], CLASSES),
    "prompt-before": ([Prompt(2, "before_cls", "shifted", "first_row")], CLASSES),
    "prefix": ([Prefix(4)], ANSWERS),
    "prefix-shifted": ([Prefix(2, "shifted")], TaskSpec("embedding", max_length=32, head="none", pooling="mean")),
    "all": ([Lora(rank=2), Bitfit(), Adapter("pfeiffer", 3), Prompt(1), Prefix(2)], CLASSES),
    "labels": ([Lora(rank=2)], TaskSpec("zero-shot", LABELS, 32, "mean", "none")),
    "probe": ([], TaskSpec("classification", ("x", "y"), 32, "max", "linear")),
    "base": ([], TaskSpec("embedding", max_length=32, head="none")),
}
# the kinds that scale rows, which not every engine can
FACTORS: dict[str, tuple[list[Any], TaskSpec]] = {
    "vera": ([Vera(("value", "output", "down"), rank=7)], CLASSES),
    "ia3": ([Ia3(("value", "output"), ("down",))], CLASSES),
    "ia3-up": ([Ia3(("up",), ("output",)), Lora(("up", "output"), rank=2)], TAGS),
    "ia3-upper": ([Ia3(("value",), layers=(2,)), Norms(layers=(1,))], CLASSES),
    "norms": ([Norms()], CLASSES),
    "norms-pfeiffer": ([Norms(biases=False), Adapter("pfeiffer", width=3)], TAGS),
}
TEXTS = (
    "the cat was good",
    "a very bad film . not great !",
    "Ada went to Paris in the early red house on the river , very late",
    "dog",
)
CONTEXT = "Ada met the dog in London . the cat was in the house on the river bank , where money was not very good ."


def record(task: TaskSpec, i: int) -> dict[str, Any]:
    """A record that fits the task."""
    if task.kind == "question-answering":
        return {"question": "where was the dog ?", "context": CONTEXT if i % 2 else "the dog was in Paris"}
    if task.kind == "multiple-choice":
        return {"question": TEXTS[i % 4], "choices": ["the house", "a very cold river bank"]}
    if task.kind == "token-classification":
        return {"tokens": TEXTS[i % 4].split()}
    if task.kind == "zero-shot":
        return {"text": TEXTS[i % 4], **({"labels": [f"{TEXTS[i % 4]}_house", "Paris", "very good"]} if i else {})}
    pair = {"text_pair": TEXTS[(i + 1) % 4]} if task.kind == "regression" and i % 2 else {}
    return {"text": TEXTS[i % 4], **pair}


def requests() -> list[Request]:
    """Three requests a delta, the deltas interleaved."""
    return [
        Request(name, record(task, i), id=f"{name}/{i}", logits=True)
        for i in range(3)
        for name, (_, task) in DELTAS.items()
    ]


def pipeline(encoder: Encoder) -> Pipeline:
    """A pipeline with all the deltas, whose updates are as large beside the weights at every width."""
    size = 0.1 * (32 / encoder.anatomy.hidden) ** 0.5
    made = Pipeline(encoder)
    for seed, (name, (specs, task)) in enumerate(DELTAS.items()):
        if name != "base":
            made.add(tiny.delta(encoder, name, specs, task, seed, size))
    return made


def logits(answer: dict[str, Any]) -> torch.Tensor:
    """All logits of an answer, flat, in float64."""
    windows = answer["logits"] if isinstance(answer["logits"][0], list) else [answer["logits"]]
    return torch.cat([torch.tensor(window, dtype=torch.float64).flatten() for window in windows])


@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "minilm"])
def test_mixed_batch_equals_solo(family: str, prepacked: bool, tmp_path: Path) -> None:
    encoder = Encoder.load("minilm") if family == "minilm" else tiny.encoder(family, tmp_path)
    if prepacked and not (available() and encoder.prepack(True)):
        pytest.skip("this torch has no prepacked oneDNN linears")
    made = pipeline(encoder)
    jobs = [made.prepare(request) for request in requests()]
    together = made.run(jobs)
    assert len(together) == len(jobs)
    for job, mixed in zip(jobs, together, strict=True):
        alone = made.run([job])[0]
        assert mixed.id == alone.id == job.request.id
        assert (logits(mixed.as_dict()) - logits(alone.as_dict())).abs().max() <= 1e-5
        plain = {k: v for k, v in mixed.as_dict().items() if k in ("label", "choice", "entities")}
        assert plain.keys() <= alone.as_dict().keys()


@pytest.mark.skipif(not available(torch.bfloat16), reason="this processor's oneDNN has no bfloat16")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_kind_in_bfloat16_is_near_and_neighbours_change_it_by_rounding(family: str, tmp_path: Path) -> None:
    made = pipeline(tiny.encoder(family, tmp_path))
    for seed, (name, (specs, task)) in enumerate(FACTORS.items()):
        made.add(tiny.delta(made.encoder, name, specs, task, seed))
    asked = [Request(name, record(task, i), logits=True) for i in range(2) for name, (_, task) in FACTORS.items()]
    jobs = [made.prepare(request) for request in (*requests(), *asked)]
    exact = torch.cat([logits(one.as_dict()) for one in made.run(jobs)])
    made.round()
    assert made.encoder.prepack(True)
    assert {column.dtype for pool in made.bank.pools.values() for column in pool.columns.values()} == {torch.bfloat16}
    together = [logits(one.as_dict()) for one in made.run(jobs)]
    assert 1e-5 < (torch.cat(together) - exact).norm() / exact.norm() < 0.05
    for job, mixed in zip(jobs, together, strict=True):
        alone = logits(made.run([job])[0].as_dict())
        assert (alone - mixed).norm() <= 0.03 * mixed.norm() + 0.01


@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_factors_in_a_mixed_batch_equal_solo(family: str, prepacked: bool, tmp_path: Path) -> None:
    encoder = tiny.encoder(family, tmp_path)
    if prepacked and not (available() and encoder.prepack(True)):
        pytest.skip("this torch has no prepacked oneDNN linears")
    made = pipeline(encoder)
    for seed, (name, (specs, task)) in enumerate(FACTORS.items()):
        made.add(tiny.delta(encoder, name, specs, task, seed))
    asked = [Request(name, record(task, i), logits=True) for i in range(2) for name, (_, task) in FACTORS.items()]
    jobs = [made.prepare(request) for request in (*requests()[:15], *asked)]
    for job, mixed in zip(jobs, made.run(jobs), strict=True):
        alone = made.run([job])[0]
        assert (logits(mixed.as_dict()) - logits(alone.as_dict())).abs().max() <= 1e-5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_delta_changes_the_answer(family: str, tmp_path: Path) -> None:
    """A component that reached no module would leave the base's answer."""
    encoder = tiny.encoder(family, tmp_path)
    made = Pipeline(encoder)
    task = TaskSpec("embedding", max_length=32, head="none")
    made.add(tiny.delta(encoder, "none", [], task))
    specs = [spec for parts, _ in DELTAS.values() for spec in parts]
    for i, spec in enumerate(specs):
        made.add(tiny.delta(encoder, f"d{i}", [spec], task, i))
    names = ["none", *(f"d{i}" for i in range(len(specs)))]
    out = made.run([made.prepare(Request(name, {"text": TEXTS[1]})) for name in names])
    vectors = torch.tensor([prediction.answer["embedding"] for prediction in out])
    assert ((vectors[1:] - vectors[0]).abs().amax(1) > 1e-4).all()
