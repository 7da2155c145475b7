"""Deltas of every kind and task, and batches as clients send them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.export.session import answer
from bertology_serve.export.torch_exporter import Graph
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.norms import Norms
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.kinds.vera import Vera
from bertology_serve.tasks.spec import Encoding, TaskSpec
from tests import tiny

CLASSES = TaskSpec("classification", ("bad", "good", "none"), max_length=48)
TAGS = TaskSpec("token-classification", ("O", "B-LOC", "I-LOC"), max_length=48)
ANSWERS = TaskSpec("question-answering", max_length=40, stride=4)
VECTORS = TaskSpec("embedding", max_length=32, head="none", pooling="mean")
SCORES = TaskSpec("regression", max_length=32, pooling="mean")
ALL_LINEARS = ("query", "key", "value", "output", "up", "down")

FOLDS = [Lora(ALL_LINEARS, rank=3), Bitfit()]
EVERYTHING = [Lora(rank=2), Bitfit(), Adapter("pfeiffer", 3), Prompt(3), Prefix(2)]
# name -> (components, task)
DELTAS: dict[str, tuple[list[Any], TaskSpec]] = {
    "folds": (FOLDS, CLASSES),
    "lora": ([Lora(("key", "value"), rank=4, rslora=True)], ANSWERS),
    "lora-one-layer": ([Lora(("query",), rank=3, layers=(1,))], SCORES),
    "vera": ([Vera(("query", "down"), rank=5)], TAGS),
    "vera-key": ([Vera(("value",), rank=3, key=1, save_projection=False, layers=(1,))], CLASSES),
    "bitfit-attention": ([Bitfit("attention")], TaskSpec("multiple-choice", max_length=32)),
    "bitfit-upper": ([Bitfit(layers=(1,))], CLASSES),
    "houlsby": ([Adapter(width=5)], CLASSES),
    "houlsby-gelu": ([Adapter(width=3, after="attention", activation="gelu")], TAGS),
    "pfeiffer": ([Adapter("pfeiffer", width=7, drop_lowest=1)], TAGS),
    "prompt": ([Prompt(3)], CLASSES),
    "prompt-tags": ([Prompt(2)], TAGS),
    "prompt-before": ([Prompt(2, "before_cls")], ANSWERS),
    "prompt-peft": ([Prompt(2, "before_cls", "shifted", "first_row")], CLASSES),
    "prefix": ([Prefix(4)], ANSWERS),
    "prefix-shifted": ([Prefix(2, "shifted")], VECTORS),
    "everything": (EVERYTHING, CLASSES),
    "flags": (
        [Bitfit()],
        TaskSpec("multi-label", ("a", "b", "c", "d"), max_length=48, thresholds=(0.1, 0.2, 0.3, 0.4)),
    ),
    "probe": ([], TaskSpec("classification", ("x", "y"), max_length=48, pooling="max", head="linear")),
}
# the tasks for which the graph for many has no head
ALONE: dict[str, tuple[list[Any], TaskSpec]] = {
    "words": ([Lora(rank=2)], TaskSpec("sparse", max_length=32, width=len(tiny.WORDS) + len(tiny.SPECIAL))),
    "vectors": ([Prompt(2)], TaskSpec("multi-vector", max_length=32, width=6)),
}
# the kinds that scale rows: merged, or in the graph for many deltas
FACTORS: dict[str, tuple[list[Any], TaskSpec]] = {
    "ia3": ([Ia3(("key", "value"), ("down",))], CLASSES),
    "ia3-lora": ([Ia3(("up", "query"), ("output", "down")), Lora(("up", "output"), rank=2)], TAGS),
    "ia3-upper": ([Ia3(layers=(1,)), Norms(layers=(1,))], CLASSES),
    "norms": ([Norms()], CLASSES),
    "norms-pfeiffer": ([Norms(biases=False), Adapter("pfeiffer", width=3), Bitfit()], TAGS),
}


def small(family: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    """A random encoder of two layers."""
    monkeypatch.setitem(tiny._SIZE, "num_hidden_layers", 2)
    if family == "distilbert":
        config = tiny.CONFIGS[family]()
        config.n_layers = 2
        monkeypatch.setitem(tiny.CONFIGS, family, lambda: config)
    return tiny.encoder(family, directory)


def encodings(lengths: tuple[int, ...], typed: bool, seed: int = 3) -> list[Encoding]:
    """Random sequences; the second half of each is of type 1 where the model has types."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [tuple(torch.randint(5, 40, (length,), generator=generator).tolist()) for length in lengths]
    return [Encoding(ids, tuple(int(typed and i > len(ids) // 2) for i in range(len(ids)))) for ids in drawn]


def padded(sequences: list[Encoding], left: bool, extra: int = 0) -> list[Tensor]:
    """ids, mask and types [B, L], padded on one side with ids that would be noticed."""
    length = max(map(len, sequences)) + extra
    ids = torch.full((len(sequences), length), 7)
    mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, one in enumerate(sequences):
        at = slice(length - len(one), length) if left else slice(0, len(one))
        ids[row, at], mask[row, at], types[row, at] = torch.tensor(one.ids), 1, torch.tensor(one.types)
    return [ids, mask, types]


def answered(graph: Graph, *inputs: Tensor) -> Tensor:
    """What a graph in torch answers, as ``Session.run`` gives it."""
    outputs = [out.detach().numpy() for out in graph(*inputs)]
    return torch.from_numpy(answer(dict(zip(graph.outputs, outputs, strict=True))))


def ran(session: Any, arrays: Mapping[str, Any]) -> Any:
    """The same for a session of ONNX Runtime."""
    names = [one.name for one in session.get_outputs()]
    return answer(dict(zip(names, session.run(names, dict(arrays)), strict=True)))
