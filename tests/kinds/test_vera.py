"""VeRA: peft's pair bit for bit, its update in float64, and what stands on disk."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from bertology_serve.deltas import store
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import FormatError, Unsupported
from bertology_serve.kinds.vera import VERA, Vera, projections
from tests import tiny
from tests.deltas import samples

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A")
SPEC = Vera(("query", "down"), rank=5, key=9)


def theirs(path: Path, **more: object) -> peft.PeftModel:
    """peft's VeRA on a small BERT, its vectors away from their start."""
    config = peft.VeraConfig(r=5, target_modules=r".*(query|\d\.output\.dense)", projection_prng_key=9, **more)
    model = peft.get_peft_model(AutoModel.from_pretrained(path), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def test_the_pair_is_pefts_bit_for_bit(tmp_path: Path) -> None:
    tiny.save("bert", tmp_path)
    model = theirs(tmp_path)
    a, b = projections(9, 5, 48, 32)
    assert torch.equal(a, model.base_model.vera_A["default"])
    assert torch.equal(b, model.base_model.vera_B["default"])


@pytest.mark.parametrize("saved", [True, False])
def test_the_update_is_pefts_in_float64(tmp_path: Path, saved: bool) -> None:
    encoder = tiny.encoder("bert", tmp_path / "base")
    model = theirs(tmp_path / "base", save_projection=saved)
    model.save_pretrained(tmp_path / "vera")
    delta = store.load(
        tmp_path / "vera", encoder.anatomy, base=encoder.ref, task=samples.VECTORS, name="x",
        options=encoder.config.to_dict(),
    )  # fmt: skip
    assert delta.specs == (Vera(("query", "down"), rank=5, key=9, save_projection=saved),)
    tensors = {name.removeprefix("vera."): tensor.double() for name, tensor in delta.tensors.items()}
    effects = VERA.effects(delta.specs[0], tensors, encoder.anatomy)
    model.double()
    for name, slot in ((name, encoder.anatomy.slot(name)) for name in ("query", "down")):
        for layer, path in enumerate(slot.paths):
            own = effects.low_rank[name]
            module = model.base_model.model.get_submodule(str(path))
            expected = module.get_delta_weight("default")
            assert expected.abs().max() > 0.01
            torch.testing.assert_close(own.b[layer].T @ own.a[layer], expected, atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("saved", [True, False])
def test_what_is_written_is_what_peft_writes(tmp_path: Path, saved: bool) -> None:
    encoder = tiny.encoder("bert", tmp_path / "base")
    spec = Vera(("query", "down"), rank=5, key=9, save_projection=saved)
    delta = tiny.delta(encoder, "x", [spec], samples.VECTORS)
    store.save(delta, tmp_path / "ours", encoder.anatomy, encoder.config.to_dict())
    theirs(tmp_path / "base", save_projection=saved).save_pretrained(tmp_path / "theirs")
    ours, peft_own = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in peft_own.items()}
    assert samples.same(store.load(tmp_path / "ours", encoder.anatomy), delta)


def test_only_the_vectors_are_trained_and_none_decays(tmp_path: Path) -> None:
    live = TrainableDelta(tiny.encoder("bert", tmp_path), [SPEC], samples.CLASSES)
    trained = {name for name, parameter in live.tensors.named_parameters() if parameter.requires_grad}
    assert trained == {"vera-query-d", "vera-query-b", "vera-down-d", "vera-down-b"}
    assert {f"tensors.{name}" for name in trained} <= live.no_decay()
    assert torch.equal(live.freeze("x").tensors["vera.a"], projections(9, 5, 48, 32)[0])


def test_slices_of_a_packed_module_are_served_but_are_not_pefts(tmp_path: Path) -> None:
    encoder = tiny.encoder("modernbert", tmp_path / "base")
    delta = tiny.delta(encoder, "x", [Vera(rank=4)], samples.CLASSES)
    directory = store.save(delta, tmp_path / "x", encoder.anatomy, encoder.config.to_dict())
    assert not list((tmp_path / "x").rglob("adapter_config.json")), directory
    assert "one pair of vectors for the whole module" in next((tmp_path / "x").rglob("README.md")).read_text()
    Pipeline(encoder).add(delta)


def test_a_pair_drawn_elsewhere_is_kept(tmp_path: Path) -> None:
    """Another machine may round another way: what the file holds is what counts."""
    encoder = tiny.encoder("bert", tmp_path / "base")
    delta = tiny.delta(encoder, "x", [SPEC], samples.VECTORS)
    moved = {name: tensor + 0.5 if name in ("vera.a", "vera.b") else tensor for name, tensor in delta.tensors.items()}
    own = {name.removeprefix("vera."): tensor for name, tensor in moved.items()}
    expected = own["query.d"][1].unsqueeze(1) * own["a"][:, :32]
    torch.testing.assert_close(VERA.effects(SPEC, own, encoder.anatomy).low_rank["query"].a[1], expected)


def test_faults_are_named(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path / "base")
    written = VERA.peft.write(SPEC, VERA.init(SPEC, encoder.anatomy, torch.Generator()), encoder.anatomy, "")
    root = "base_model.model."
    good = {name if name.startswith("base_model.") else root + name: tensor for name, tensor in written.items()}
    query = "encoder.layer.1.attention.self.query.vera_lambda_"

    def refused(tensors: dict[str, torch.Tensor], **config: object) -> str:
        with pytest.raises((FormatError, Unsupported)) as found:
            VERA.peft.load(config, dict(tensors), encoder.anatomy)
        return str(found.value)

    assert "holds no VeRA tensors" in refused({})
    assert "lacks one of vera_lambda_d and vera_lambda_b" in refused(
        {name: tensor for name, tensor in good.items() if name != f"{root}{query}d"}
    )
    assert "is no linear projection" in refused({f"{root}pooler.dense.vera_lambda_{x}": torch.zeros(3) for x in "bd"})
    assert "which save_projection promises" in refused(
        {name: tensor for name, tensor in good.items() if name != "base_model.vera_A"}
    )
    assert "has shape [32]; expected [5]" in refused(good | {f"{root}{query}d": torch.zeros(32)})
    assert "d_initial is 'x'; expected a number" in refused(good, d_initial="x")


def test_a_pruned_encoder_does_not_take_it_over(tmp_path: Path) -> None:
    """Its heads' columns would no longer be the first of the shared pair's."""
    assert VERA.cut is None


def test_encoder_answers_in_a_batch_with_others(tmp_path: Path) -> None:
    encoder: Encoder = tiny.encoder("roberta", tmp_path)
    pipeline = Pipeline(encoder)
    for name, specs in (("vera", samples.SPECS["vera"]), ("lora", samples.SPECS["lora"])):
        pipeline.add(tiny.delta(encoder, name, specs, samples.CLASSES))
    texts = ["the cat was good", "a dog , not very early"]
    alone = [pipeline(text, delta=name) for name in ("vera", "lora") for text in texts]
    from bertology_serve.encoder.pipeline import Request

    mixed = pipeline.answer(Request(name, {"text": text}) for name in ("vera", "lora") for text in texts)
    for one, other in zip(alone, mixed, strict=True):
        assert one.answer["score"] == pytest.approx(other.answer["score"], abs=1e-6)
