"""Prefix tuning: trained keys and values in every layer (Li and Liang 2021, arXiv 2101.00190; Liu et al. 2021,
P-tuning v2, arXiv 2110.07602). They are visible from every row, whatever the attention window, after any rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bertology_serve.config_fields import check_known, named_fields
from bertology_serve.errors import FormatError, Unsupported, nearest
from bertology_serve.families import FAMILIES, family_named
from bertology_serve.files import JsonObject
from bertology_serve.kinds.effects import Effects, PrefixEffect
from bertology_serve.kinds.kinds import Cut, Kind, Tensors, check_positive, normal
from bertology_serve.kinds.peft_format import PROMPT_EMBEDDINGS, Config, PeftFormat, take, virtual_sizes
from bertology_serve.kinds.slots import KEY, Anatomy


@named_fields
@dataclass(frozen=True)
class Prefix:
    """``length`` is V. ``positions="shifted"`` moves the text's positions by V, as peft does.

    Keys of normed rows have entries near one, and so do those that training starts with: from N(0, 0.02²), as weights
    are drawn, 2,000 rows of SST-2 end two to three points lower. Raises SpecError for values that make no sense.
    """

    length: int = 20
    positions: str = "kept"
    init_std: float = 1.0

    def __post_init__(self) -> None:
        check_positive(length=self.length, init_std=self.init_std)
        check_known("positions", self.positions, ("kept", "shifted"))


def init(spec: Prefix, anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """``keys`` and ``values`` [L, V, H] from N(0, init_std²), float32; pruned, as wide as the widest layer."""
    slot = anatomy.slot(KEY)
    tensors = {name: normal((anatomy.layers, spec.length, slot.outputs), spec.init_std, generator)
               for name in ("keys", "values")}  # fmt: skip
    for rows in tensors.values():
        for layer in range(anatomy.layers):
            rows[layer, :, slot.outputs_of(layer) :] = 0.0  # heads that a pruned layer lacks
    return tensors


def effects(spec: Prefix, tensors: Tensors, anatomy: Anatomy) -> Effects:
    """The keys and values of every layer."""
    return Effects(prefix=PrefixEffect(tensors["keys"], tensors["values"], spec.positions))


def cut(_: Prefix, tensors: Tensors, anatomy: Anatomy, left: Cut) -> Tensors:
    """Keys and values by head."""
    return {name: left.outputs(rows, anatomy.slot(KEY), range(anatomy.layers)) for name, rows in tensors.items()}


def write(_: Prefix, own: Mapping[str, Tensor], anatomy: Anatomy, __: str) -> Tensors:
    """``prompt_embeddings`` [V, 2 L H]: layer i's keys in block 2i and its values in block 2i + 1."""
    both = torch.stack([own["keys"], own["values"]], 1)
    return {PROMPT_EMBEDDINGS: both.permute(2, 0, 1, 3).reshape(both.shape[2], -1)}


def read(_: Prefix, written: Tensors, anatomy: Anatomy, __: str) -> Tensors:
    """The inverse of ``write``."""
    return split(take(written, PROMPT_EMBEDDINGS), anatomy)


def split(embeddings: Tensor, anatomy: Anatomy) -> Tensors:
    """peft's [V, 2 L H] as ``keys`` and ``values`` [L, V, H]."""
    width = anatomy.slot(KEY).outputs
    wanted = 2 * anatomy.layers * width
    if embeddings.dim() != 2 or embeddings.shape[1] != wanted:
        raise FormatError(f"{PROMPT_EMBEDDINGS} has shape {list(embeddings.shape)}; expected [V, {wanted}]")
    both = embeddings.view(-1, anatomy.layers, 2, width).permute(2, 1, 0, 3)
    return {"keys": both[0].contiguous(), "values": both[1].contiguous()}


def config(spec: Prefix, anatomy: Anatomy, _: str) -> JsonObject:
    """Sizes."""
    width = {"token_dim": anatomy.hidden, "encoder_hidden_size": anatomy.hidden, "prefix_projection": False}
    return width | virtual_sizes(spec.length, anatomy)


def load(_: Config, tensors: Tensors, anatomy: Anatomy) -> tuple[Prefix, Tensors]:
    """Spec and rows of peft's prefix tuning; raises Unsupported for families on which peft runs none."""
    if not family_named(anatomy.family).peft_prefix:
        known = [name for name, family in FAMILIES.items() if family.peft_prefix]
        raise Unsupported(f"peft itself runs no prefixes on {anatomy.family}; {nearest(anatomy.family, known)}")
    own = split(take(tensors, PROMPT_EMBEDDINGS), anatomy)
    return Prefix(own["keys"].shape[1], positions="shifted"), own


def obstacle(spec: Prefix, _: Anatomy) -> str:
    """Positions must be as peft has them."""
    return "" if spec.positions == "shifted" else "peft computes no prefix in this way"


# What peft saves of a projected prefix is what the projection makes of it.
PEFT = PeftFormat(
    "PREFIX_TUNING", write, read, config, load,
    settings=frozenset({"prefix_projection"}), obstacle=obstacle, virtual=True,
)  # fmt: skip
PREFIX = Kind("prefix", Prefix, init, effects, cut, peft=PEFT)
