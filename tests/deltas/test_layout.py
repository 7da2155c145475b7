from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertology_serve.deltas.layout import from_disk, head_root, to_disk
from bertology_serve.errors import FormatError
from bertology_serve.kinds import kinds
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from tests import tiny
from tests.deltas import samples

TARGETS = ("query", "key", "value", "output", "up", "down")
loras = st.builds(
    Lora,
    targets=st.lists(st.sampled_from(TARGETS), min_size=1, unique=True).map(tuple),
    rank=st.integers(1, 5),
    rslora=st.booleans(),
    layers=st.none() | st.sets(st.integers(0, 2), min_size=1).map(lambda layers: tuple(sorted(layers))),
)
others = st.fixed_dictionaries(
    {},
    optional={
        "bitfit": st.builds(Bitfit, biases=st.sampled_from(["all", "attention"])),
        "prompt": st.builds(
            Prompt,
            length=st.integers(1, 4),
            placement=st.sampled_from(["after_cls", "before_cls"]),
            positions=st.sampled_from(["kept", "shifted"]),
            head_reads=st.sampled_from(["cls", "first_row"]),
        ),
        "prefix": st.builds(Prefix, length=st.integers(1, 4), positions=st.sampled_from(["kept", "shifted"])),
    },
)


@settings(max_examples=150)
@given(st.sampled_from(tiny.FAMILIES), st.none() | loras, others)
def test_every_delta_comes_back_bit_for_bit(family: str, lora: Lora | None, rest: dict[str, object]) -> None:
    specs = ([lora] if lora else []) + list(rest.values())
    delta, anatomy = samples.delta(family, specs), samples.anatomy(family)
    written = to_disk(delta.tensors, specs, anatomy, "base_model.model.x.")
    assert all(tensor.is_contiguous() for tensor in written.values())
    read = from_disk(written, specs, anatomy, "base_model.model.x.")
    assert not written
    assert read.keys() == delta.tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in delta.tensors.items())


def test_lora_has_pefts_names_and_shapes() -> None:
    delta = samples.delta("bert", [Lora(rank=3)])
    written = to_disk(delta.tensors, delta.specs, samples.anatomy("bert"), "base_model.model.bert.")
    name = "base_model.model.bert.encoder.layer.2.attention.self.value.lora_"
    assert torch.equal(written[f"{name}A.weight"], delta.tensors["lora.value.a"][2])
    assert torch.equal(written[f"{name}B.weight"], delta.tensors["lora.value.b"][2].T)
    assert len(written) == 2 * 2 * 3


@pytest.mark.parametrize("targets", [("query", "value"), ("value",), ("key", "qkv"), ("query", "key", "value")])
def test_slices_of_a_packed_module_share_one_pair_that_does_the_same(targets: tuple[str, ...]) -> None:
    spec, anatomy = Lora(targets, rank=3), samples.anatomy("modernbert")
    delta = samples.delta("modernbert", [spec])
    written = to_disk(delta.tensors, [spec], anatomy, "")
    a, b = (written[f"layers.1.attn.Wqkv.lora_{side}.weight"] for side in "AB")
    assert (a.shape, b.shape) == ((3 * len(targets), 32), (96, 3 * len(targets)))
    expected = torch.zeros(96, 32)
    for name in targets:
        lo, hi = anatomy.slot(name).part or (0, 96)
        expected[lo:hi] += delta.tensors[f"lora.{name}.b"][1].T @ delta.tensors[f"lora.{name}.a"][1]
    torch.testing.assert_close(b @ a, expected)


def test_prefixes_lie_as_peft_views_them() -> None:
    spec, anatomy = Prefix(2, "shifted"), samples.anatomy("bert")
    delta = samples.delta("bert", [spec])
    embeddings = to_disk(delta.tensors, [spec], anatomy, "")["prompt_embeddings"]
    # peft: view(batch, V, 2 L, heads, D).permute([2, 0, 3, 1, 4]).split(2), then keys, values of each layer
    layers = embeddings.view(1, 2, 2 * 3, 4, 8).permute(2, 0, 3, 1, 4).split(2)
    for i, (keys, values) in enumerate(layers):
        assert torch.equal(keys[0].transpose(0, 1).reshape(2, 32), delta.tensors["prefix.keys"][i])
        assert torch.equal(values[0].transpose(0, 1).reshape(2, 32), delta.tensors["prefix.values"][i])


@pytest.mark.parametrize("name", ["prompt", "prefix", "houlsby", "bitfit"])
def test_what_peft_computes_otherwise_has_names_of_our_own(name: str) -> None:
    delta = samples.delta("bert", samples.SPECS[name])
    written = to_disk(delta.tensors, delta.specs, samples.anatomy("bert"), "")
    assert {name.removeprefix("bertology.") for name in written} == set(delta.tensors)


def test_heads_stand_where_peft_puts_them() -> None:
    bert = samples.anatomy("bert")
    for name, root in (("lora", "base_model.model."), ("all", "base_model.model."), ("prompt-peft", "base_model.")):
        assert head_root(samples.SPECS[name], bert) == root
    assert head_root(samples.SPECS["prefix-peft"], bert) == "base_model."
    assert head_root((), bert) == head_root(samples.SPECS["prompt"], bert) == "base_model.model."


@pytest.mark.parametrize("kind", ["lora", "bitfit-attention"])
def test_values_outside_the_slots_are_refused(kind: str) -> None:
    specs, anatomy = samples.SPECS[kind], samples.anatomy("modernbert")
    specs = (Lora(("query",)),) if kind == "lora" else specs
    written = to_disk(samples.delta("modernbert", specs).tensors, specs, anatomy, "")
    assert from_disk(dict(written), specs, anatomy, "")
    if kind == "lora":
        written["layers.0.attn.Wqkv.lora_B.weight"][40, 0] = 1.0
    else:
        written["layers.0.attn.Wqkv.beft_bias"] = torch.full((1, 97), math.pi)
    with pytest.raises(FormatError, match=r"slots do not reach|has shape"):
        from_disk(written, specs, anatomy, "")


def test_a_missing_tensor_is_named() -> None:
    specs, anatomy = samples.SPECS["lora"], samples.anatomy("bert")
    written = to_disk(samples.delta("bert", specs).tensors, specs, anatomy, "")
    del written["encoder.layer.1.attention.self.query.lora_B.weight"]
    with pytest.raises(FormatError, match=r"query\.lora_B\.weight' is missing; expected \[32, 3\]"):
        from_disk(written, specs, anatomy, "")


def test_counts_do_not_change_on_the_way_but_for_zero_blocks() -> None:
    anatomy = samples.anatomy("bert")
    delta = samples.delta("bert", samples.SPECS["all"])
    written = to_disk(delta.tensors, delta.specs, anatomy, "")
    assert sum(tensor.numel() for tensor in written.values()) == kinds.parameter_count(delta.specs, anatomy)


def test_shapes_are_known_without_the_compiler_of_torch():
    """Some operations on the meta device import torch._dynamo, a second of a server's start."""
    code = (
        "import sys; from bertology_serve import *; from bertology_serve.deltas.layout import expected_shapes\n"
        "anatomy, known = Encoder('minilm', light=True).anatomy, set(sys.modules)\n"
        "for spec in (Lora(), Bitfit(), Adapter(), Prompt(4), Prefix(4), Ia3(), Norms(), Vera()):\n"
        "    expected_shapes([spec], anatomy)\n"
        "    assert 'torch._dynamo' not in set(sys.modules) - known, spec"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
