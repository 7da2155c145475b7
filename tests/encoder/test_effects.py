"""Each kind against its formula, written out with hooks on transformers' own BERT: nothing of ours in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import Unsupported
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.norms import Norms
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny

TASK = TaskSpec("embedding", max_length=32, pooling="cls", head="none", normalize=False)
TEXT = "Ada met the cat in Paris . the film was good"


def engine(encoder: Encoder, delta: Delta) -> Tensor:
    """What the engine answers, among neighbours with other deltas."""
    pipeline = Pipeline(encoder)
    pipeline.add(delta)
    pipeline.add(tiny.delta(encoder, "other", [Lora(rank=3), Bitfit()], TASK, seed=9))
    names = ("other", delta.name, "base")
    answers = pipeline.run([pipeline.prepare(Request(name, {"text": TEXT})) for name in names])
    return torch.tensor(answers[1].answer["embedding"])


@pytest.fixture
def setting(tmp_path: Path) -> tuple[Encoder, Any, Tensor]:
    encoder = tiny.encoder("bert", tmp_path)
    own = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    return encoder, own, torch.tensor([encoder.tokenizer(TEXT)["input_ids"]])


def first_row(own: Any, **inputs: Any) -> Tensor:
    """transformers' [CLS] row."""
    with torch.inference_mode():
        return own(**inputs).last_hidden_state[0, 0]  # type: ignore[no-any-return]


def hook(module: Any, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """``change(input, output)`` replaces a module's output."""
    module.register_forward_hook(lambda _, inputs, output: change(inputs[0], output))


def test_lora(setting: tuple[Encoder, Any, Tensor]) -> None:
    encoder, own, ids = setting
    delta = tiny.delta(encoder, "d", [Lora(("query", "down"), rank=2, alpha=6, layers=(0, 2))], TASK)
    for i, layer in enumerate((0, 2)):
        block = own.encoder.layer[layer]
        for name, module in (("query", block.attention.self.query), ("down", block.output.dense)):
            a, b = delta.tensors[f"lora.{name}.a"][i], delta.tensors[f"lora.{name}.b"][i]
            hook(module, lambda x, y, a=a, b=b: y + 3.0 * (x @ a.T) @ b)
    torch.testing.assert_close(engine(encoder, delta), first_row(own, input_ids=ids), atol=2e-6, rtol=1e-5)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    assert Lora(rank=16, alpha=8).scale == 0.5
    assert Lora(rank=16, alpha=8, rslora=True).scale == 2.0


def test_bitfit(setting: tuple[Encoder, Any, Tensor]) -> None:
    encoder, own, ids = setting
    delta = tiny.delta(encoder, "d", [Bitfit()], TASK)
    with torch.no_grad():
        for slot in encoder.anatomy.slots.values():
            for i, path in enumerate(slot.paths):
                own.get_submodule(str(path)).bias += delta.tensors[f"bitfit.{slot.name}"][i]
    torch.testing.assert_close(engine(encoder, delta), first_row(own, input_ids=ids), atol=2e-6, rtol=1e-5)


def test_ia3(setting: tuple[Encoder, Any, Tensor]) -> None:
    encoder, own, ids = setting
    delta = tiny.delta(encoder, "d", [Ia3(("key", "value", "output"), ("down",))], TASK, size=0.3)
    for i, block in enumerate(own.encoder.layer):
        attention = block.attention
        linears = {"key": attention.self.key, "value": attention.self.value, "output": attention.output.dense}
        for name, linear in linears.items():
            factors = delta.tensors[f"ia3.{name}"][i]
            hook(linear, lambda _, y, factors=factors: factors * y)
        inner = delta.tensors["ia3.down"][i]
        block.output.dense.register_forward_pre_hook(lambda _, inputs, inner=inner: (inner * inputs[0],))
    torch.testing.assert_close(engine(encoder, delta), first_row(own, input_ids=ids), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("biases", [True, False])
def test_norms(setting: tuple[Encoder, Any, Tensor], biases: bool) -> None:
    encoder, own, ids = setting
    delta = tiny.delta(encoder, "d", [Norms(biases)], TASK, size=0.3)
    assert len(delta.tensors) == (6 if biases else 3)
    with torch.no_grad():
        for name, tensor in delta.tensors.items():
            _, slot, part = name.split(".")
            for i, path in enumerate(encoder.anatomy.slots[slot].paths):
                getattr(own.get_submodule(str(path)), part).add_(tensor[i])
    torch.testing.assert_close(engine(encoder, delta), first_row(own, input_ids=ids), atol=2e-6, rtol=1e-5)


def test_ia3_in_a_family_that_projects_positions_is_refused(tmp_path: Path) -> None:
    encoder = tiny.encoder("deberta-v3", tmp_path)
    with pytest.raises(Unsupported, match="projects positions with query and key too"):
        Pipeline(encoder).add(tiny.delta(encoder, "d", [Ia3()], TASK))


def adapter(delta: Delta, place: str, i: int, act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``U act(D h + b_d) + b_u`` of one place and layer."""
    down, down_bias, up, up_bias = (
        delta.tensors[f"adapter.{place}.{name}"][i] for name in ("down", "down_bias", "up", "up_bias")
    )
    return lambda h: act(h @ down.T + down_bias) @ up + up_bias


def test_houlsby(setting: tuple[Encoder, Any, Tensor]) -> None:
    encoder, own, ids = setting
    delta = tiny.delta(encoder, "d", [Adapter(width=4)], TASK)
    for i, block in enumerate(own.encoder.layer):
        for place, module in (("output", block.attention.output.dense), ("down", block.output.dense)):
            f = adapter(delta, place, i, F.silu)
            hook(module, lambda _, h, f=f: h + f(h))
    torch.testing.assert_close(engine(encoder, delta), first_row(own, input_ids=ids), atol=2e-6, rtol=1e-5)


def test_pfeiffer_uses_residual_and_norm_twice_and_adapterdrop_leaves_low_layers_alone(
    setting: tuple[Encoder, Any, Tensor],
) -> None:
    encoder, own, ids = setting
    delta = tiny.delta(encoder, "d", [Adapter("pfeiffer", 4, drop_lowest=1)], TASK)
    for i, block in enumerate(own.encoder.layer[1:]):
        norm, f = block.output.LayerNorm, adapter(delta, "ffn_norm", i, F.relu)

        def again(s: Tensor, normed: Tensor, norm: Any = norm, f: Any = f) -> Tensor:
            return F.layer_norm(f(normed) + s, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

        hook(norm, again)
    torch.testing.assert_close(engine(encoder, delta), first_row(own, input_ids=ids), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "order", "positions", "read"),
    [
        (Prompt(2), "c p p t", [0, 0, 0, 1], 0),
        (Prompt(2, "before_cls"), "p p c t", [0, 0, 0, 1], 2),
        (Prompt(2, "before_cls", "shifted", "first_row"), "p p c t", [0, 1, 2, 3], 0),
        (Prompt(2, "after_cls", "shifted"), "c p p t", [0, 1, 2, 3], 0),
    ],
)
def test_prompt(
    setting: tuple[Encoder, Any, Tensor], spec: Prompt, order: str, positions: list[int], read: int
) -> None:
    encoder, own, ids = setting
    delta = tiny.delta(encoder, "d", [spec], TASK)
    words, vectors = own.get_input_embeddings()(ids)[0], delta.tensors["prompt.vectors"]
    parts = {"c": words[:1], "p": vectors, "t": words[1:]}
    rows = torch.cat([parts[name] for name in dict.fromkeys(order.split())])[None]
    rest = torch.arange(positions[-1] + 1, positions[-1] + ids.shape[1] - 1)
    at = torch.cat([torch.tensor(positions), rest])[None]
    with torch.inference_mode():
        hidden = own(inputs_embeds=rows, position_ids=at, token_type_ids=torch.zeros_like(at)).last_hidden_state
    torch.testing.assert_close(engine(encoder, delta), hidden[0, read], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", ["kept", "shifted"])
def test_prefix(setting: tuple[Encoder, Any, Tensor], positions: str) -> None:
    encoder, own, ids = setting
    delta = tiny.delta(encoder, "d", [Prefix(3, positions)], TASK)
    for i, block in enumerate(own.encoder.layer):
        attention = block.attention.self

        def with_prefix(hidden: Tensor, *_: Any, at: Any = attention, i: int = i, **__: Any) -> tuple[Tensor, None]:
            keys = torch.cat([delta.tensors["prefix.keys"][i], at.key(hidden)[0]])
            values = torch.cat([delta.tensors["prefix.values"][i], at.value(hidden)[0]])
            q, k, v = (rows.view(rows.shape[0], 4, 8).transpose(0, 1) for rows in (at.query(hidden)[0], keys, values))
            weights = (q @ k.transpose(1, 2) / 8**0.5).softmax(-1)
            return (weights @ v).transpose(0, 1).reshape(1, -1, 32), None

        attention.forward = with_prefix
    at = torch.arange(ids.shape[1])[None] + (3 if positions == "shifted" else 0)
    expected = first_row(own, input_ids=ids, position_ids=at)
    torch.testing.assert_close(engine(encoder, delta), expected, atol=2e-6, rtol=1e-5)
