"""The whole pass by the kernels, in Triton's interpreter, against the whole pass by torch; see ``test_kernels``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bertology_serve.encoder import attention, linear
from bertology_serve.encoder.cuda_graphs import Graphs
from bertology_serve.encoder.pipeline import Request
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.kernels import autograd, bottleneck, dispatch, fused_lora_linear, layernorm, shrink_expand
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.registry import task_for
from tests import tiny
from tests.encoder.test_mixed import DELTAS, TEXTS, logits, pipeline, record, requests
from tests.encoder.test_varlen import by_definition
from tests.kernels.deltas import Setting

LAYERS = 3  # of the tiny models
LAUNCHES = (
    (fused_lora_linear, "fused_lora_linear"),
    (shrink_expand, "split_lora_linear"),
    (bottleneck, "grouped_bottleneck_adapter"),
    (layernorm, "layer_norm"),
)


@contextmanager
def as_on_hopper() -> Iterator[dict[str, mock.Mock]]:
    """What ``dispatch`` does on a GPU of compute capability 9.0, here; each kernel's calls by its name."""
    hopper = mock.Mock(return_value=("sm_90", ""))
    with ExitStack() as stack:
        for module in (dispatch, dispatch):
            stack.enter_context(mock.patch.object(module, "architecture", hopper))
        yield {name: stack.enter_context(_spied(module, name)) for module, name in LAUNCHES}


def _spied(module: Any, name: str) -> Any:
    return mock.patch.object(module, name, wraps=getattr(module, name))


def _same_answers(family: str, joins: bool = False, every: int = 1) -> dict[str, int]:
    """The kernels' calls by name for one in ``every`` of the mixed batch's requests, whose answers are compared."""
    with tempfile.TemporaryDirectory() as folder:
        made = pipeline(tiny.encoder(family, Path(folder)))
    jobs = [made.prepare(request) for request in requests()[::every]]
    by_torch = made.run(jobs)
    assert not joins or linear.join(made.encoder.model, made.encoder.anatomy)
    with as_on_hopper() as calls:
        by_kernels = made.run(jobs)
    for one, other in zip(by_torch, by_kernels, strict=True):
        assert (logits(one.as_dict()) - logits(other.as_dict())).abs().max() <= 1e-5, one.delta
    return {name: spy.call_count for name, spy in calls.items()}


def check_bert(setting: Setting) -> None:
    """Separate query, key and value; Houlsby and Pfeiffer adapters."""
    calls = _same_answers("bert")
    assert calls["fused_lora_linear"] + calls["split_lora_linear"] >= 3 * 6, calls
    assert calls["grouped_bottleneck_adapter"] >= 3, calls
    assert calls["layer_norm"] >= 2 * 3, calls


def check_joined(setting: Setting) -> None:
    """BERT's query, key and value as three slices of one launch."""
    apart, together = (_same_answers("bert", joins, every=5) for joins in (False, True))
    assert together["fused_lora_linear"] + together["split_lora_linear"] == (
        apart["fused_lora_linear"] + apart["split_lora_linear"] - 2 * LAYERS
    ), (apart, together)


def check_modernbert(setting: Setting) -> None:
    """One projection for query, key and value: three slices of one launch."""
    calls = _same_answers("modernbert", every=2)
    assert calls["fused_lora_linear"] + calls["split_lora_linear"] >= 3, calls


def _step() -> tuple[TrainableDelta, list[Any], list[torch.Tensor]]:
    """A live delta with BERT's every kind of column, encoded texts, and the parameters that it trains."""
    with tempfile.TemporaryDirectory() as folder:
        encoder = tiny.encoder("bert", Path(folder))
    task = DELTAS["lora-1"][1]
    live = TrainableDelta(encoder, [Lora(("query", "value", "up"), rank=4, dropout=0.0), Bitfit()], task, 0)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    live.eval()
    made = task_for(task)
    encodings = [
        encoding
        for text in TEXTS
        for encoding in made.encode(made.example({"text": text}, "here", labelled=False), encoder.tokenizer)
    ]
    return live, encodings, [parameter for parameter in live.parameters() if parameter.requires_grad]


def _gradients(live: TrainableDelta, encodings: list[Any], leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(live(encodings).square().sum(), leaves)


def _nearly(by_torch: tuple[torch.Tensor, ...], by_kernels: tuple[torch.Tensor, ...], tolerance: float) -> None:
    largest = max(gradient.norm() for gradient in by_torch)  # a key's bias has none but rounding
    for one, other in zip(by_torch, by_kernels, strict=True):
        assert (one - other).norm() <= tolerance * largest


def check_gradients(setting: Setting) -> None:
    """A training step's gradients, by the kernels' own backward passes and by torch; joined projections too."""
    step = _step()
    by_torch = _gradients(*step)
    with as_on_hopper(), _spied(autograd, "differentiable_lora_linear") as launched:
        _nearly(by_torch, _gradients(*step), 1e-6)
        apart = launched.call_count
        assert apart >= 3 * 3
        assert linear.join(step[0].encoder.model, step[0].encoder.anatomy)
        _nearly(by_torch, _gradients(*step), 1e-6)
        assert launched.call_count - apart == apart - 2 * LAYERS


def check_autocast(setting: Setting) -> None:
    """Training under autocast: the kernels take parameters and rows in its dtype, as torch does."""
    step = _step()
    by_torch = _gradients(*step)
    with as_on_hopper(), _spied(autograd, "differentiable_lora_linear") as launched:
        with torch.autocast("cpu", dtype=torch.float16):
            by_kernels = _gradients(*step)
        assert {call.args[0].dtype for call in launched.call_args_list} == {torch.float16}
    _nearly(by_torch, by_kernels, 2e-2)


def _again(compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], Any], torch.Tensor]:
    """Stands in for CUDA's recording: the same function on the same tensors, told nothing of the new batch."""
    out = compute()
    return (lambda: out.copy_(compute())), out


def _replayed(family: str, deltas: Iterable[str] = DELTAS) -> tuple[Graphs, float]:
    """Two batches with other texts and lengths: (what was recorded, largest difference of the second's logits)."""
    with tempfile.TemporaryDirectory() as folder:
        made = pipeline(tiny.encoder(family, Path(folder)))
    first, second = (
        [
            made.prepare(Request(name, _own(record(DELTAS[name][1], i + by), i), logits=True))
            for i, name in enumerate(deltas)
        ]
        for by in (0, 2)
    )
    with as_on_hopper():
        want = made.run(second)
        with (
            mock.patch.object(attention, "fits", return_value=True),
            mock.patch.object(attention, "_torch_varlen", return_value=by_definition),
        ):
            assert made.encoder.use_graphs(_again)
            made.run(first)
            found = made.run(second)
    pairs = zip(want, found, strict=True)
    graphs = made.encoder.graphs
    assert graphs is not None
    return graphs, max(float((logits(a.as_dict()) - logits(b.as_dict())).abs().max()) for a, b in pairs)


def _own(fields: dict[str, Any], i: int) -> dict[str, Any]:
    """A record of its own text: sequences of one text would fork, and such passes are not recorded."""
    if "text" in fields:
        return fields | {"text": f"{fields['text']} {tiny.WORDS[i]}"}
    return fields | {"tokens": [*fields["tokens"], tiny.WORDS[i]]} if "tokens" in fields else fields


def check_replay(setting: Setting) -> None:
    """A replay answers for other sequences of other lengths than those that it was recorded with."""
    graphs, difference = _replayed("bert")
    assert difference <= 1e-5, difference
    assert len(graphs) == 1, list(graphs)


def check_no_replay_by_host(setting: Setting) -> None:
    """MPNet's biased attention is done group by group: nothing is recorded, and the answers are right."""
    graphs, difference = _replayed("mpnet", ("lora-4", "bitfit", "base"))
    assert difference <= 1e-5, difference
    assert len(graphs) == 0
