"""How the pass reaches each family's attention.

BERT, RoBERTa, ELECTRA, DistilBERT, ModernBERT and all that go through transformers' attention interface call the
registered function below. MPNet and DeBERTa ignore that interface: their attention modules get our own forward on the
same parameters. Any other family is padded and keeps its own attention.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bertology_serve.encoder import deberta, mpnet
from bertology_serve.encoder.attention import packed_attention
from bertology_serve.encoder.forward_context import CurrentContext
from bertology_serve.kinds.slots import QUERY, Anatomy

NAME = "bertology_packed"


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key, value [1, heads, T, D] -> [1, T, heads, D]."""
    now = module.current.it
    out = packed_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        now.layout,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=None if sliding_window is None else sliding_window - 1,
        prefix=now.prefix(module.layer_number),
        dropout=dropout,
        attend=now.attend(module.layer_number),
    )
    return out.view(1, query.shape[2], query.shape[1], query.shape[3]), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Packed attention needs no mask."""


def register() -> None:
    """Makes the packed attention known to transformers; calling it again changes nothing."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)


def attention_modules(model: nn.Module, anatomy: Anatomy) -> list[Any]:
    """The module of each layer that holds the query projection and calls attention."""
    paths = [str(path).rpartition(".")[0] for path in anatomy.slot(QUERY).paths]
    return [model.get_submodule(path) for path in paths]


def prepare(model: Any, anatomy: Anatomy, current: CurrentContext) -> bool:
    """Connects the model's attention with the pass; whether it can take packed rows at all."""
    own = {"mpnet": mpnet.attend, "deberta-v2": deberta.attend}.get(anatomy.family)
    if own is None and not getattr(model, "_supports_attention_backend", False):
        return False
    register()
    for layer, module in enumerate(attention_modules(model, anatomy)):
        module.current, module.layer_number = current, layer
        if own is not None:
            module.forward = MethodType(own, module)
    if anatomy.family == "mpnet":
        mpnet.prepare(model)
    if anatomy.family == "deberta-v2":
        deberta.prepare(model, current)
    model.dense_attention = model.config._attn_implementation
    model.config._attn_implementation = NAME
    return True


def undo(model: Any) -> bool:
    """Gives a model that goes through the attention interface its own attention back; it no longer packs."""
    model.config._attn_implementation = model.dense_attention
    return False
