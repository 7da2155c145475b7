"""Soft prompts: trained vectors that stand in the sequence (Lester et al. 2021, arXiv 2104.08691).

They enter before the embedding LayerNorm; token type 0 and, with ``positions="kept"``, the position of [CLS] are
added to them like to any token, and the text keeps its own positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bertology_serve.config_fields import check_known, named_fields
from bertology_serve.errors import FormatError
from bertology_serve.files import JsonObject
from bertology_serve.kinds.effects import Effects, PromptEffect
from bertology_serve.kinds.kinds import Kind, Tensors, check_positive, normal, uncut
from bertology_serve.kinds.peft_format import PROMPT_EMBEDDINGS, Config, PeftFormat, take, virtual_sizes
from bertology_serve.kinds.slots import Anatomy


@named_fields
@dataclass(frozen=True)
class Prompt:
    """``length`` is V. ``placement`` is ``after_cls`` or ``before_cls``.

    ``positions="shifted"`` and ``head_reads="first_row"`` are peft's ways, which imports from peft keep. Raises
    SpecError for values that make no sense.
    """

    length: int = 20
    placement: str = "after_cls"
    positions: str = "kept"
    head_reads: str = "cls"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_positive(length=self.length, init_std=self.init_std)
        check_known("placement", self.placement, ("after_cls", "before_cls"))
        check_known("positions", self.positions, ("kept", "shifted"))
        check_known("head_reads", self.head_reads, ("cls", "first_row"))


def init(spec: Prompt, anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """``vectors`` [V, E] from N(0, init_std²), float32."""
    return {"vectors": normal((spec.length, anatomy.embedding_width), spec.init_std, generator)}


def effects(spec: Prompt, tensors: Tensors, anatomy: Anatomy) -> Effects:
    """The vectors and where they stand."""
    return Effects(prompt=PromptEffect(tensors["vectors"], spec.placement, spec.positions, spec.head_reads))


def write(_: Prompt, own: Mapping[str, Tensor], anatomy: Anatomy, __: str) -> Tensors:
    """``prompt_embeddings`` [V, E]."""
    return {PROMPT_EMBEDDINGS: own["vectors"]}


def read(_: Prompt, written: Tensors, anatomy: Anatomy, __: str) -> Tensors:
    """The inverse of ``write``."""
    return {"vectors": take(written, PROMPT_EMBEDDINGS)}


def config(spec: Prompt, anatomy: Anatomy, _: str) -> JsonObject:
    """Sizes."""
    return {"prompt_tuning_init": "RANDOM", "token_dim": anatomy.embedding_width} | virtual_sizes(spec.length, anatomy)


def load(_: Config, tensors: Tensors, anatomy: Anatomy) -> tuple[Prompt, Tensors]:
    """Spec and vectors of peft's prompt tuning."""
    vectors, wide = take(tensors, PROMPT_EMBEDDINGS), anatomy.embedding_width
    if vectors.dim() != 2 or not len(vectors) or vectors.shape[1] != wide:
        raise FormatError(f"{PROMPT_EMBEDDINGS} has shape {list(vectors.shape)}; expected [V, {wide}]")
    return Prompt(len(vectors), *_PEFTS), {"vectors": vectors}


def obstacle(spec: Prompt, _: Anatomy) -> str:
    """Rows, positions and head must be as peft has them."""
    own = (spec.placement, spec.positions, spec.head_reads)
    return "" if own == _PEFTS else "peft computes no prompt in this way"


_PEFTS = ("before_cls", "shifted", "first_row")
PEFT = PeftFormat("PROMPT_TUNING", write, read, config, load, obstacle=obstacle, virtual=True)
PROMPT = Kind("prompt", Prompt, init, effects, uncut, peft=PEFT)
