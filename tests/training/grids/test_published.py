"""What the packaged grids train is as large as the papers say, counted on the meta device."""

from __future__ import annotations

import functools

import pytest
from transformers import DebertaV2Config, RobertaConfig

from bertology_serve.encoder.anatomy import empty_model, find_anatomy
from bertology_serve.kinds import kinds
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.heads import Head, head_form
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.training.grids.grid import find_grid
from bertology_serve.training.methods import specs_for

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SHAPES = {
    "base": lambda: RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
    "large": lambda: RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **LARGE),
    "xxlarge": lambda: DebertaV2Config(
        vocab_size=128100, hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144,
        relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], conv_kernel_size=3, conv_act="gelu", max_position_embeddings=512,
        position_biased_input=False, type_vocab_size=0,
    ),
}  # fmt: skip


@functools.cache
def shape(name: str) -> tuple[Anatomy, int]:
    """An encoder's anatomy, and its parameters."""
    model = empty_model(SHAPES[name]())
    return find_anatomy(model), sum(parameter.numel() for parameter in model.parameters())


COUNTS = {
    ("lora-roberta-base", "BitFit"): 102_144,
    ("lora-roberta-base", "Adapter D, 4 layers"): 298_176,
    ("lora-roberta-base", "Adapter D, 12 layers"): 894_528,
    ("lora-roberta-base", "LoRA"): 294_912,
    ("lora-roberta-large", "LoRA"): 786_432,
    ("lora-roberta-large", "Adapter P"): 3_171_840,
    ("lora-roberta-large", "Adapter P, narrow"): 811_392,
    ("lora-roberta-large", "Adapter H"): 6_343_680,
    ("lora-roberta-large", "Adapter H, narrow"): 835_968,
    ("eh-ft-roberta-large", "LoRA"): 4 * 24 * 8 * 2 * 1024,
    ("eh-ft-roberta-large", "BitFit"): 271_360,
    ("eh-ft-roberta-large", "Prefix"): 2 * 24 * 17 * 1024,
}


@pytest.mark.parametrize(("name", "method"), COUNTS)
def test_deltas_have_the_published_size(name: str, method: str):
    run = next(run for run in find_grid(name).runs() if run.method.name == method)
    anatomy = shape(name.rpartition("-")[2])[0]
    count = kinds.parameter_count(specs_for(run.config, anatomy), anatomy)
    assert count == COUNTS[name, method]
    if run.method.label:  # the papers round, wide adapters down: 3.0M is 3,171,840, 6.0M is 6,343,680
        assert count == pytest.approx(float(run.method.label.removesuffix("M")) * 1e6, rel=0.07)


@pytest.mark.parametrize(("name", "published"), [("base", 125e6), ("large", 355e6), ("xxlarge", 1500e6)])
def test_whole_models_have_the_published_size(name: str, published: float):
    assert shape(name)[1] == pytest.approx(published, rel=0.05 if name == "xxlarge" else 0.01)


def test_lora_on_deberta_xxlarge_is_4_7_million_at_rank_16():
    """The paper's appendix says rank 8, its scripts 16: 4.7M is 16."""
    assert kinds.parameter_count([Lora(rank=16)], shape("xxlarge")[0]) == 4_718_592


@pytest.mark.parametrize(
    ("hidden", "labels", "count"), [(768, 2, 592_130), (1024, 2, 1_051_650), (768, 3, 887_811 - 294_912)]
)
def test_heads_of_roberta_have_the_published_size(hidden: int, labels: int, count: int):
    """887,811 floats, delta and head, are the 3.4 MB of the released LoRA checkpoint."""
    spec = TaskSpec("classification", tuple(map(str, range(labels))))
    head = Head(head_form("roberta", "roberta", spec, hidden, {}))
    assert sum(parameter.numel() for parameter in head.parameters()) == count
