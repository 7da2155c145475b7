"""Gates on attention heads: each head's output times ξ, so that 0 masks it (Michel et al. 2019, arXiv 1905.10650)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from bertology_serve.encoder.attention import Group


class Gates:
    """Takes the place of torch's attention (see ``passing.Heads``); differentiable in the gates.

    ``values``: [L, heads] for all sequences, or [S, L, heads], one set a packed sequence.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __call__(
        self, layer: int, group: Group, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        values = self.values[..., : out.shape[1]]  # a pruned layer has fewer heads
        if values.dim() == 2:
            return out * values[layer][:, None, None]
        return out * values[list(group.sequences), layer][:, :, None, None]
