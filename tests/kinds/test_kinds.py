"""Every kind: its parameter counts at full size, what its spec refuses, and what it does to an encoder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from transformers import BertConfig, RobertaConfig

from bertology_serve.deltas.layout import shapes_of
from bertology_serve.encoder.anatomy import empty_model, find_anatomy
from bertology_serve.errors import SpecError
from bertology_serve.kinds import kinds
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.kinds import spec_from_dict
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.norms import Norms
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.kinds.slots import OUTSIDE, Anatomy
from bertology_serve.kinds.vera import Vera
from tests.deltas import samples


@functools.cache
def full_size(name: str) -> Anatomy:
    """RoBERTa-base, RoBERTa-large or BERT-base, on the meta device."""
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    config = {
        "base": lambda: RobertaConfig(max_position_embeddings=514, type_vocab_size=1),
        "large": lambda: RobertaConfig(**large, max_position_embeddings=514, type_vocab_size=1),
        "bert": BertConfig,
    }[name]()
    return find_anatomy(empty_model(config))


@pytest.mark.parametrize(
    ("spec", "base", "large"),
    [
        (Lora(), 294_912, 786_432),
        (Lora(("key", "value")), 294_912, 786_432),
        (Bitfit(), 102_144, 271_360),
        (Bitfit("attention"), 27_648, 73_728),
        (Adapter(width=64), 2_379_264, 6_343_680),
        (Prompt(20), 15_360, 20_480),
        (Prefix(20), 368_640, 983_040),
        (Vera(rank=1024), 43_008, 98_304),
        (Vera(rank=256), 24_576, 61_440),
    ],
)
def test_counts_are_those_of_the_papers(spec: Any, base: int, large: int) -> None:
    assert kinds.parameter_count([spec], full_size("base")) == base
    assert kinds.parameter_count([spec], full_size("large")) == large


@pytest.mark.parametrize(
    ("spec", "model", "count"),
    [
        (Adapter(width=8), "large", 835_968),
        (Adapter("pfeiffer", width=48), "base", 894_528),
        (Adapter("pfeiffer", width=64), "large", 3_171_840),
        (Adapter("pfeiffer", width=16), "large", 811_392),
        (Adapter("pfeiffer", width=16), "base", 304_320),
        (Adapter("pfeiffer", width=48, drop_lowest=8), "base", 298_176),
        (Bitfit(), "bert", 102_912 - 768),  # the papers count the pooler's bias, which belongs to the head here
    ],
)
def test_counts_of_single_sizes(spec: Any, model: str, count: int) -> None:
    assert kinds.parameter_count([spec], full_size(model)) == count


def test_counts_of_combinations_add_up_and_a_probe_has_none() -> None:
    anatomy = full_size("base")
    assert kinds.parameter_count([Lora(), Bitfit()], anatomy) == 294_912 + 102_144
    assert kinds.parameter_count([], anatomy) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lora(rank=0), "rank is 0; expected a number above 0"),
        (lambda: Lora(alpha=-1.0), "alpha is -1.0"),
        (lambda: Lora(dropout=1.0), r"dropout is 1.0; expected a number from 0 up to, not including, 1"),
        (lambda: Lora(init="zeros"), "unknown init 'zeros'; known: gaussian, kaiming"),
        (lambda: Bitfit("atention"), "did you mean 'attention'"),
        (lambda: Adapter("houlsbi"), "did you mean 'houlsby'"),
        (lambda: Adapter(width=0), "width is 0"),
        (lambda: Adapter(after="norm"), "unknown after 'norm'"),
        (lambda: Adapter(activation="swish"), "unknown activation 'swish'"),
        (lambda: Adapter(drop_lowest=-1), "drop_lowest is -1"),
        (lambda: Adapter(drop_lowest=1, layers=(1,)), "both say which layers have adapters"),
        (lambda: Bitfit(layers=()), r"layers is \(\); expected whole numbers"),
        (lambda: Norms(layers="1"), "layers is '1'; expected whole numbers"),  # type: ignore[arg-type]
        (lambda: Ia3(layers=(1.5,)), r"layers is \(1.5,\)"),  # type: ignore[arg-type]
        (lambda: Prompt(0), "length is 0"),
        (lambda: Prompt(placement="after"), "did you mean 'after_cls'"),
        (lambda: Prompt(positions="moved"), "unknown positions 'moved'"),
        (lambda: Prompt(head_reads="last"), "unknown head_reads 'last'"),
        (lambda: Prefix(init_std=0.0), "init_std is 0.0"),
        (lambda: Vera(rank=0), "rank is 0"),
        (lambda: Vera(key=-1), "key is -1; expected a whole number from 0 up"),
        (lambda: kinds.kind_named("lorra"), "did you mean 'lora'"),
    ],
)
def test_values_without_sense_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_a_spec_is_built_from_a_table() -> None:
    lora = kinds.kind_named("lora")
    assert spec_from_dict(lora, {"rank": 4, "targets": ["key"]}) == Lora(("key",), rank=4)
    with pytest.raises(SpecError, match="lora has no field 'rnak'; did you mean 'rank'"):
        spec_from_dict(lora, {"rnak": 4})


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([Lora(("qery",))], "has no slot 'qery'; did you mean 'query'"),
        ([Lora(("ffn_norm",))], "is no linear projection"),
        ([Lora(layers=(3,))], r"layers \[3\] must rise and lie in 0..2"),
        ([Lora(layers=(1, 0))], "must rise"),
        ([Bitfit(layers=(3,))], r"layers \[3\] must rise and lie in 0..2"),
        ([Norms(layers=(2, 1))], "must rise"),
        ([Ia3(layers=(7,))], "must rise"),
        ([Adapter(layers=(3,))], "must rise"),
        ([Adapter(drop_lowest=3)], "the encoder has only 3 layers"),
        ([Lora(), Lora(rank=2)], "holds each kind once"),
    ],
)
def test_what_the_encoder_lacks_is_refused(specs: list[Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        kinds.init(specs, samples.anatomy("bert"), None)


@pytest.mark.parametrize("family", samples.FAMILIES)
@pytest.mark.parametrize("kind", samples.SPECS)
def test_meta_and_real_tensors_agree_and_the_same_seed_gives_the_same(family: str, kind: str) -> None:
    specs, anatomy = samples.SPECS[kind], samples.anatomy(family)
    meta = kinds.init(specs, anatomy, None)
    real, again = (kinds.init(specs, anatomy, torch.Generator().manual_seed(3)) for _ in range(2))
    assert shapes_of(meta) == shapes_of(real)
    assert all(tensor.is_meta for tensor in meta.values())
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, again[name]) for name, tensor in real.items())


def test_a_fresh_delta_changes_nothing_where_it_can() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = kinds.init([Lora(), Bitfit(), Adapter()], samples.anatomy("bert"), generator)
    zero = {name for name, tensor in tensors.items() if not tensor.any()}
    assert {"lora.query.b", "lora.value.b", "bitfit.query", "adapter.output.down_bias"} <= zero
    assert not any(name.endswith((".a", "output.down", "output.up")) for name in zero)


@pytest.mark.parametrize(("init", "deviation"), [("kaiming", 1 / (3 * 768) ** 0.5), ("gaussian", 1 / 8)])
def test_a_is_drawn_as_the_spec_says(init: str, deviation: float) -> None:
    tensors = kinds.init([Lora(init=init)], full_size("base"), torch.Generator().manual_seed(0))
    assert float(tensors["lora.query.a"].std()) == pytest.approx(deviation, rel=0.02)


def test_the_scale_of_lora() -> None:
    assert Lora(rank=4, alpha=8.0).scale == 2.0
    assert Lora(rank=4, alpha=8.0, rslora=True).scale == 4.0
    delta = samples.delta("bert", [Lora(("key",), rank=4, alpha=8.0, layers=(1,))])
    update = delta.effects(samples.anatomy("bert")).low_rank["key"]
    assert torch.equal(update.b[1], 2.0 * delta.tensors["lora.key.b"][0])
    assert not update.a[[0, 2]].any()


def test_bitfit_gives_biases_to_an_encoder_that_has_none() -> None:
    biases = kinds.init([Bitfit()], samples.anatomy("modernbert"), None)
    assert set(biases) == {f"bitfit.{slot}" for slot in ("query", "key", "value", "output", "up", "gate", "down")}


def test_pfeiffer_stands_on_the_norm_or_in_pre_norm_encoders_on_the_ffn() -> None:
    for family, place in (("bert", "ffn_norm"), ("modernbert", "down")):
        delta = samples.delta(family, samples.SPECS["pfeiffer"])
        found = delta.effects(samples.anatomy(family)).bottleneck
        assert set(found) == {place}
        assert found[place].layers == (1, 2)
        assert found[place].activation == "relu"


LAYERED: dict[str, Any] = {
    "lora": Lora(rank=2),
    "bitfit": Bitfit(),
    "bitfit-attention": Bitfit("attention"),
    "houlsby": Adapter(width=3),
    "pfeiffer": Adapter("pfeiffer", width=3),
    "ia3": Ia3(),
    "norms": Norms(),
    "vera": Vera(rank=3),
}


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v3"])
@pytest.mark.parametrize("kind", LAYERED)
def test_a_delta_on_some_layers_is_one_on_all_with_nothing_elsewhere(family: str, kind: str) -> None:
    anatomy, whole = samples.anatomy(family), samples.delta(family, [LAYERED[kind]])
    upper = replace(LAYERED[kind], layers=(1, 2))
    own, blank = dict(whole.tensors), 1.0 if kind == "ia3" else 0.0
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in own.items():
        slot = anatomy.slots.get(name.split(".")[1])
        if slot is None:  # VeRA's pair
            kept[name] = tensor
            continue
        present = slot.present if len(tensor) == len(slot.present) else tuple(range(slot.depth))
        stays = [present.index(layer) for layer in (1, 2)] if slot.depth == 3 else []
        kept |= {name: tensor[stays]} if stays else {}
        own[name] = torch.full_like(tensor, blank).index_copy(0, torch.tensor(stays, dtype=torch.long), tensor[stays])
    assert shapes_of(kept) == shapes_of(kinds.init([upper], anatomy, None))
    found, expected = kinds.effects([upper], kept, anatomy), kinds.effects([LAYERED[kind]], own, anatomy)
    assert (found.lowest(3), expected.lowest(3)) == (1, 0)
    for part in ("low_rank", "bias", "bottleneck", "scale", "inner"):
        there, here = getattr(expected, part), getattr(found, part)
        for slot_name in there:
            if slot_name in here:
                for one, other in zip(_stacks(here[slot_name]), _stacks(there[slot_name]), strict=True):
                    assert torch.equal(one, other), (part, slot_name)
            else:
                assert slot_name in OUTSIDE
                assert not any(stack.any() for stack in _stacks(there[slot_name]))


def _stacks(change: Any) -> list[torch.Tensor]:
    parts = [change] if isinstance(change, torch.Tensor) else [getattr(change, one.name) for one in fields(change)]
    return [part for part in parts if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize(
    ("specs", "lowest"),
    [
        ([Lora(layers=(1,)), Bitfit(layers=(2,))], 1),
        ([Lora(layers=(2,)), Bitfit()], 0),
        ([Bitfit(layers=(2,)), Norms(layers=(1,))], 1),
        ([Ia3(layers=(2,)), Adapter(layers=(2,))], 2),
        ([Ia3(layers=(2,)), Prefix(2)], 0),
        ([Bitfit(layers=(2,)), Prompt(2)], 0),
        ([Norms()], 0),
        ([], 3),
    ],
)
def test_the_lowest_layer_that_is_changed(specs: list[Any], lowest: int) -> None:
    anatomy = samples.anatomy("bert")
    assert kinds.effects(specs, samples.delta("bert", specs).tensors, anatomy).lowest(anatomy.layers) == lowest


def test_biases_of_some_layers_leave_the_embeddings_alone() -> None:
    tensors = kinds.init([Bitfit(layers=(2,))], samples.anatomy("deberta-v3"), None)
    assert not {name.removeprefix("bitfit.") for name in tensors} & set(OUTSIDE)
    assert {len(tensor) for tensor in tensors.values()} == {1}


def test_what_cannot_be_folded_says_so() -> None:
    def unfoldable(kind: str) -> tuple[str, ...]:
        return samples.delta("bert", samples.SPECS[kind]).effects(samples.anatomy("bert")).unfoldable

    assert unfoldable("lora") == unfoldable("bitfit") == unfoldable("probe") == ()
    assert unfoldable("all") == ("bottleneck adapter", "soft prompt", "prefix")


def test_a_delta_knows_its_kinds_and_bytes() -> None:
    assert samples.delta("bert", ()).kinds == ("probe",)
    delta = samples.delta("bert", samples.SPECS["lora"])
    assert delta.kinds == ("lora",)
    assert delta.bytes == 4 * (1152 + 1155)


def test_prefixes_begin_as_large_as_normed_rows() -> None:
    tensors = kinds.init([Prefix(64)], samples.anatomy("bert"), torch.Generator().manual_seed(0))
    for rows in tensors.values():
        assert rows.std().item() == pytest.approx(1.0, abs=0.05)
