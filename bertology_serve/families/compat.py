"""The only door to what transformers does not promise: its attention interface, functions of its models, and patches.

Whatever another version of transformers may rename is named here, or handed to ``patch``, which says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from threading import RLock
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bertology_serve.errors import SpecError, Unsupported, nearest
from bertology_serve.families.family import Current, Family

if TYPE_CHECKING:
    from transformers import ModernBertConfig, PretrainedConfig
    from transformers.models.deberta_v2.modeling_deberta_v2 import ConvLayer as ConvLayer
    from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Encoder as DebertaV2Encoder
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention as DebertaAttention
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder as MPNetEncoder
    from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention as MPNetSelfAttention

    __all__ = ["ConvLayer", "DebertaAttention", "DebertaV2Encoder", "MPNetEncoder", "MPNetSelfAttention"]

    class HiddenModel(nn.Module):
        """What is relied on of HuggingFace's headless encoders; ``dense_attention`` names what they came with."""

        config: PretrainedConfig
        base_model_prefix: str
        pooler: nn.Module | None
        dense_attention: str | None

        def get_input_embeddings(self) -> nn.Embedding: ...

        def __call__(self, **inputs: object) -> HiddenOutput: ...

    class HiddenOutput:
        """What it gives: [B, R, H], and where they were asked for those after the embeddings and each layer."""

        last_hidden_state: Tensor
        hidden_states: tuple[Tensor, ...]


BUILDING = RLock()
"""Held while transformers builds a model. It then replaces functions of its classes and of torch for all threads, and
puts back what it found: of two threads the second leaves what the first had put there, and models stay untied."""
NAME = "bertology_packed"
ATTENTION_SETTINGS = ("_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset")
"""What a configuration says of attention on the machine at hand."""


def connect(model: HiddenModel, modules: Sequence[nn.Module], current: Current, family: Family) -> bool:
    """Connects a model's attention, one module a layer, with the pass; whether it can take packed rows at all.

    Raises Unsupported where this version of transformers lacks what a family's own attention replaces.
    """
    if family.connect is not None:
        family.connect(model, modules, current)
    elif has_interface(model):
        for layer, module in enumerate(modules):
            module.current, module.layer_number = current, layer  # type: ignore[assignment]
    else:
        return False
    model.dense_attention = attention_of(model.config)
    use_attention(model.config, NAME if is_own(model) else register(NAME, attend_packed))
    return True


def disconnect(model: HiddenModel) -> bool:
    """Gives a model that goes through the attention interface its own attention back; it no longer packs."""
    use_attention(model.config, model.dense_attention)
    return False


def patch(owner: nn.Module, name: str, function: Callable[..., object]) -> None:
    """Replaces a method of one module; raises Unsupported where this transformers has none of that name."""
    if not hasattr(type(owner), name):
        raise Unsupported(
            f"transformers {version('transformers')} has no {type(owner).__name__}.{name}, which is replaced here; "
            "install another version"
        )
    setattr(owner, name, function)


def nothing(*_: object, **__: object) -> None:
    """For what a model would make for [T, T] rows, and packed attention needs not."""


def attend_packed(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key, value [1, heads, T, D] -> [1, T, heads, D]."""
    out = module.current.value.attention(
        module.layer_number,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=None if sliding_window is None else sliding_window - 1,
        dropout=dropout,
    )
    return out.view(1, query.shape[2], query.shape[1], query.shape[3]), None


def register(name: str, attend: Callable[..., tuple[Tensor, None]]) -> str:
    """Makes an attention that needs no mask known to transformers; calling it again changes nothing."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, nothing)
    return name


def is_own(model: object) -> bool:
    """Whether a model's layers are our own, which ask nothing of transformers."""
    from bertology_serve.families.bert_layers import BertLayers

    return isinstance(model, BertLayers)


def has_interface(model: object) -> bool:
    """Whether a model, or its class, calls attention through transformers' interface."""
    return bool(getattr(model, "_supports_attention_backend", False))


def attention_of(config: PretrainedConfig) -> str | None:
    """The name of the attention that a configuration asks for."""
    name: str | None = config._attn_implementation
    return name


def use_attention(config: PretrainedConfig, name: str | None) -> None:
    """Asks for an attention by its name."""
    config._attn_implementation = name


_PLAIN: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU}


def activation(name: str) -> nn.Module:
    """An activation by the name that configurations give it; raises SpecError for one that is not known.

    The common ones are torch's own, as transformers has them: its table takes two seconds to import.
    """
    if name in _PLAIN:
        return _PLAIN[name]()
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise SpecError(f"unknown activation {name!r}; {nearest(name, ACT2FN)}")
    found: nn.Module = ACT2FN[name]
    return found


def deberta_distances(query: Tensor, key: Tensor, buckets: int, most: int) -> Tensor:
    """[1, 1, query rows, key rows]: the bucket of each distance between rows of q and k [..., rows, D]."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    found: Tensor = build_relative_position(query, key, bucket_size=buckets, max_position=most).to(query.device)
    return found


def deberta_buckets(distances: Tensor, buckets: int, most: int) -> Tensor:
    """The buckets of distances."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    found: Tensor = make_log_bucket_position(distances, buckets, most)
    return found


def mpnet_buckets(distances: Tensor) -> Tensor:
    """The rows of MPNet's table of biases for distances ``j - i``."""
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    found: Tensor = MPNetEncoder.relative_position_bucket(distances)  # type: ignore[no-untyped-call]
    return found


def modernbert_rotation(config: ModernBertConfig, layer_type: str) -> tuple[Tensor, float]:
    """[D / 2]: by how much a step turns each pair of dimensions in layers of a type; and what sine and cosine take."""
    from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding

    rotary = ModernBertRotaryEmbedding(config)
    return getattr(rotary, f"{layer_type}_inv_freq"), float(getattr(rotary, f"{layer_type}_attention_scaling"))


def task_classes(task: str) -> dict[str, str]:
    """The names of HuggingFace's classes for a task (``SEQUENCE_CLASSIFICATION``), by ``model_type``."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    return found
