"""Soft prompts: trained vectors that stand in the sequence (Lester et al. 2021, arXiv 2104.08691).

They enter before the embedding LayerNorm; token type 0 and, with ``positions="kept"``, the position of [CLS] are
added to them like to any token, and the text keeps its own positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bertology_serve.kinds.effects import Effects, PromptEffect
from bertology_serve.kinds.kind import Kind, Tensors, check_choice, check_positive, normal, uncut
from bertology_serve.kinds.slots import Anatomy


@dataclass(frozen=True)
class Prompt:
    """``length`` is V. ``placement`` is ``after_cls`` or ``before_cls``.

    ``positions="shifted"`` and ``head_reads="first_row"`` are peft's ways, which imports from peft keep.
    """

    length: int = 20
    placement: str = "after_cls"
    positions: str = "kept"
    head_reads: str = "cls"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_positive(length=self.length, init_std=self.init_std)
        check_choice("placement", self.placement, ("after_cls", "before_cls"))
        check_choice("positions", self.positions, ("kept", "shifted"))
        check_choice("head_reads", self.head_reads, ("cls", "first_row"))


def init(spec: Prompt, anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """``vectors`` [V, E] from N(0, init_std²), float32."""
    return {"vectors": normal((spec.length, anatomy.embedding_width), spec.init_std, generator)}


def effects(spec: Prompt, tensors: Tensors, anatomy: Anatomy) -> Effects:
    """The vectors and where they stand."""
    return Effects(prompt=PromptEffect(tensors["vectors"], spec.placement, spec.positions, spec.head_reads))


PROMPT = Kind("prompt", Prompt, init, effects, uncut)
