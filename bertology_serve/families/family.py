"""What one family of HuggingFace models does in its own way, and the forms of task heads that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from bertology_serve.families.compat import HiddenModel

Options = Mapping[str, Any]
"""Values of a model's configuration."""


@dataclass(frozen=True)
class Dense:
    """One layer of a head: ``norm(activation(x Wᵀ + b))`` for rows x [n, inputs] -> [n, outputs].

    ``path`` and ``norm`` are the names of the linear and of the LayerNorm after it in HuggingFace's task model
    (``classifier.out_proj``, ``bert.pooler.dense``). ``base_name`` and ``base_norm`` are their names in the headless
    base model, where its checkpoint may hold them. ``dropout`` says whether the layer's input is dropped in training,
    ``std`` how far its weights are drawn from zero. Of a ``tied`` layer the weight is the encoder's word embeddings,
    only its bias is the head's.
    """

    path: str
    inputs: int
    outputs: int
    activation: str | None = None
    norm: str | None = None
    bias: bool = True
    base_name: str | None = None
    base_norm: str | None = None
    dropout: bool = False
    norm_eps: float = 1e-5
    norm_bias: bool = True
    std: float = 0.02
    tied: bool = False


@dataclass(frozen=True)
class HeadShape:
    """``prefix`` is the encoder's name in HuggingFace's task models, ``hidden`` H, ``outputs`` C."""

    prefix: str
    hidden: int
    outputs: int
    options: Options


HeadForm = Callable[[HeadShape], tuple[Dense, ...]]


def classifier(shape: HeadShape) -> tuple[Dense, ...]:
    """One layer, as most families have for tags."""
    return (Dense("classifier", shape.hidden, shape.outputs, dropout=True),)


def spans(shape: HeadShape) -> tuple[Dense, ...]:
    """One layer without dropout: where answers start and end."""
    return (Dense("qa_outputs", shape.hidden, 2),)


def hidden_first(path: str, activation: str, option: str = "", base_name: str | None = None) -> HeadForm:
    """H -> H, then the classifier; ``{prefix}`` in ``path`` is the encoder's name, ``option`` the setting that names
    another activation."""

    def form(shape: HeadShape) -> tuple[Dense, ...]:
        named = shape.options.get(option, activation)
        path_there = path.format(prefix=shape.prefix)
        return Dense(path_there, shape.hidden, shape.hidden, named, base_name=base_name), *classifier(shape)

    return form


def dense_out_proj(activation: str, option: str = "") -> HeadForm:
    """RoBERTa's classification head: dense, activation, out_proj, dropout before both."""

    def form(shape: HeadShape) -> tuple[Dense, ...]:
        named = shape.options.get(option, activation)
        dense = Dense("classifier.dense", shape.hidden, shape.hidden, named, dropout=True)
        return dense, Dense("classifier.out_proj", shape.hidden, shape.outputs, dropout=True)

    return form


def token_vectors(shape: HeadShape) -> tuple[Dense, ...]:
    """ColBERT's layer (Khattab & Zaharia 2020, arXiv 2004.12832): H -> D, without bias."""
    return (Dense("linear", shape.hidden, shape.outputs, bias=False),)


def word_scores(dense: str, norm: str, bias: str, activation: str, option: str = "", eps: str = "") -> HeadForm:
    """The head of a masked language model: H -> E, activation, LayerNorm, and a score a word by its embedding.

    The names are those of its parts in HuggingFace's model; ``option`` is the setting that names the activation,
    ``eps`` that of the norm's epsilon.
    """

    def form(shape: HeadShape) -> tuple[Dense, ...]:
        width = int(shape.options.get("embedding_size") or shape.hidden)
        named, epsilon = shape.options.get(option, activation), float(shape.options.get(eps, 1e-12))
        first = Dense(dense, shape.hidden, width, named, norm, base_name=dense, base_norm=norm, norm_eps=epsilon)
        return first, Dense(bias, width, shape.outputs, base_name=bias, tied=True)

    return form


bert_words = word_scores(
    "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions",
    "gelu", "hidden_act", "layer_norm_eps",
)  # fmt: skip
roberta_words = word_scores("lm_head.dense", "lm_head.layer_norm", "lm_head", "gelu", eps="layer_norm_eps")
pooler = hidden_first("{prefix}.pooler.dense", "tanh", base_name="pooler.dense")


class FamilyContext(Protocol):
    """The batch on its way through the encoder, as a family's own modules see it."""

    @property
    def extents(self) -> Sequence[tuple[int, int]]:
        """First row and number of rows of each sequence."""
        ...

    def attention(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None = None,
        bias: Callable[[Sequence[int], Tensor, Tensor], Tensor] | None = None, dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """query, key, value [T, heads, D] -> [T, heads * D]; see ``encoder.attention.packed_attention``."""
        ...

    def changing(self, slots: Sequence[str]) -> tuple[list[str], list[int]]:
        """The deltas that change one of the slots, and for each sequence the number of its own, from 1; else 0."""
        ...

    def alone(self, delta: str, slot: str, layer: int, x: Tensor | None, y: Tensor) -> Tensor:
        """y [n, N] with what one delta does to a slot, for rows x [n, K] that belong to no sequence."""
        ...

    def outside(self, slot: str, y: Tensor) -> Tensor:
        """y [T, N] with the biases of a slot that stands outside the layers."""
        ...


class Current(Protocol):
    """Holds the batch that is under way, if any."""

    @property
    def value(self) -> FamilyContext | None: ...


@dataclass(frozen=True)
class Family:
    """What is one family's own. The defaults are those of a family of which nothing is known.

    ``name`` is the ``model_type`` of the configuration. The forms of HuggingFace's heads stand by task: for one answer
    a ``sequence``, for multiple ``choice``, for ``tokens`` and for ``answers`` in a context; ``None`` where they are
    not known. ``reads`` and ``choice_reads`` are the settings that say which rows a head reads, if it is not the first;
    ``base_head`` what a base checkpoint may hold of a head, ``words`` the form of its masked language model's.

    ``connect(model, modules, current)`` gives the attention modules of each layer a forward of our own on packed rows,
    for families that do not go through transformers' attention interface; ``build(config)`` makes the headless model of
    modules of our own, on the meta device, for those that have them. ``positions`` says how attention knows
    distances where the exporters write it out: by ``rotary`` embeddings, a ``bias`` that all layers share, or
    ``disentangled``, where query and key project positions too; ``emitted`` whether the ONNX emitter writes the family.

    ``token_types`` is how many types its tokenizer gives the texts of a pair where no configuration says (0: never
    more than one). ``peft_prefix`` says whether peft runs prefixes on it, ``adapterhub`` whether AdapterHub's names
    for it are known.
    """

    name: str
    sequence: HeadForm | None = None
    choice: HeadForm | None = None
    tokens: HeadForm | None = None
    answers: HeadForm | None = None
    words: HeadForm | None = None
    reads: str = ""
    choice_reads: str = ""
    base_head: tuple[str, ...] = ("pooler.dense.weight", "pooler.dense.bias", "pooler.weight", "pooler.bias")
    connect: Callable[[Any, Sequence[nn.Module], Current], None] | None = None
    build: Callable[[PretrainedConfig], HiddenModel] | None = None
    positions: Literal["", "rotary", "bias", "disentangled"] = ""
    emitted: bool = False
    token_types: int | None = None
    peft_prefix: bool = False
    adapterhub: bool = False

    @property
    def head_parts(self) -> tuple[str, ...]:
        """The names of all tensors of heads that a base checkpoint may hold."""
        layers = self.words(HeadShape("", 1, 1, {})) if self.words else ()
        parts = [part for layer in layers for part in (layer.base_name, layer.base_norm) if part and not layer.tied]
        biases = [f"{layer.base_name}.bias" for layer in layers if layer.tied]
        return (*self.base_head, *(f"{part}.{name}" for part in parts for name in ("weight", "bias")), *biases)
