"""ONNX by torch's exporter, for families that the emitter cannot write: the graph, their attention, the file."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from torch import Tensor, nn
from torch.nn import functional as F

from bertology_serve.encoder.anatomy import attention_modules
from bertology_serve.encoder.pruned import shrink
from bertology_serve.errors import Unsupported, VerificationError
from bertology_serve.export.delta_modules import attach
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.prompt_rows import Gathered, PromptLayout, gather
from bertology_serve.families import compat, family_named
from bertology_serve.kinds.effects import PrefixEffect
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.spec import EMBEDDING, QUESTION_ANSWERING


class Graph(nn.Module):
    """An encoder with one delta, its pooling and head.

    ``forward``: ``inputs``, int64 [B, L] each. Returns ``outputs`` (``Parts.outputs``), float32: logits [B, C]; for
    tasks that answer for every token [B, L, C], zero at padding; start and end [B, L] each; rows [B, L, H] and
    embeddings [B, H]. ``names`` maps parameters to their names in the exported
    file: HuggingFace's for the encoder; ``delta.NAME.query.0.a``, ``delta.NAME.head.classifier.weight`` for the delta.
    """

    def __init__(self, parts: ExportInputs) -> None:
        super().__init__()
        self.task, self.inputs, self.outputs = parts.task, parts.inputs, tuple(parts.outputs)
        interface = compat.has_interface(parts.kind)
        attention = compat.register("bertology_dense", _attend) if interface else "eager"
        self.model = plain_model(parts.kind, parts.config, parts.state, attention)
        self._accepted = set(inspect.signature(self.model.forward).parameters)
        added = attach(self.model, parts.effects, parts.anatomy)
        self._connect(parts, interface)
        self.head = copy.deepcopy(parts.head)
        self.names = self._named(added, parts)
        as_products(self)
        self.eval().requires_grad_(False)

    def _connect(self, parts: ExportInputs, interface: bool) -> None:
        """The soft prompt, and what the attention modules need: the scene, their layer's prefix, a family's forward."""
        prefix, anatomy = parts.effects.prefix, parts.anatomy
        self.weave, self.scene = PromptLayout(parts.effects.prompt, parts.first_position), Scene()
        own = prepare(self.model, anatomy, anatomy.max_tokens + self.weave.length)
        if prefix is not None and not (interface or own):
            raise Unsupported(f"a prefix cannot be put into a graph of {anatomy.family}; train another kind for it")
        self._attentions = attention_modules(self.model, anatomy)
        modules: list[Any] = self._attentions
        for layer, module in enumerate(modules):
            module.scene, module.prefix_rows = self.scene, _prefix_rows(prefix, layer, anatomy)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        rows = gather(input_ids, attention_mask, types)
        hidden = self._encode(rows)
        if self.task.per_token:
            out = _home(self.head(self.weave.text(hidden)), rows)
            return out.unbind(-1) if self.task.kind == QUESTION_ANSWERING else (out,)
        out = self.head(self._pool(hidden, rows))
        if self.task.kind != EMBEDDING:
            return (out,)
        return _home(self.weave.text(hidden), rows), F.normalize(out, dim=-1) if self.task.normalize else out

    def _encode(self, rows: Gathered) -> Tensor:
        """The last hidden states [B, R, H]: prompt rows among the text's, padding behind."""
        seen = self.weave.fill(rows.seen, 1)
        self.scene.enter(seen)
        inputs = {
            "inputs_embeds": self.weave.embed(self.model.get_input_embeddings()(rows.ids)),
            "attention_mask": seen.long(),
            "token_type_ids": self.weave.fill(rows.types, 0),
            "position_ids": self.weave.positions(rows.ids.shape[1]),
        }
        inputs = {name: value for name, value in inputs.items() if name in self._accepted}
        hidden: Tensor = self.model(**inputs).last_hidden_state
        return hidden

    def _pool(self, hidden: Tensor, rows: Gathered) -> Tensor:
        """[B, R, H] -> [B, H]."""
        if self.task.pooling == "cls":
            return hidden[:, self.weave.first]
        text, seen = self.weave.text(hidden), rows.seen[..., None]
        if self.task.pooling == "max":
            return text.masked_fill(~seen, torch.finfo(torch.float32).min).amax(1)
        return text.masked_fill(~seen, 0.0).sum(1) / rows.count.clamp(min=1)

    def _named(self, added: dict[str, str], parts: ExportInputs) -> dict[str, str]:
        names = {path: path.removeprefix("model.").replace(".own.", ".") for path, _ in self.named_parameters()}
        own = {f"model.{path}": name for path, name in added.items()} | {"weave.vectors": "prompt.vectors"}
        paths = {id(module): path for path, module in self.named_modules()}
        for layer, module in enumerate(self._attentions):
            path = paths[id(module)]
            own |= {f"{path}.prefix_rows.{part}": f"prefix.{layer}.{part}" for part in ("keys", "values")}
        heads = {id(parameter): name for name, _, parameter in self.head.named()}
        for path, parameter in self.head.named_parameters(prefix="head"):
            names[path] = parts.named_in_head(heads[id(parameter)])
        return names | {path: parts.named(name) for path, name in own.items() if path in names}


def _home(out: Tensor, rows: Gathered) -> Tensor:
    """[B, L, C], every row back where the caller has it, zero at padding."""
    out = out.masked_fill(~rows.seen[..., None], 0.0)
    return out.gather(1, rows.home[..., None].expand(-1, -1, out.shape[-1]))


def _prefix_rows(prefix: PrefixEffect | None, layer: int, anatomy: Anatomy) -> PrefixRows | None:
    if prefix is None:
        return None
    heads = anatomy.heads_of(layer)
    keys, values = (rows[layer, :, : heads * anatomy.head_width] for rows in (prefix.keys, prefix.values))
    return PrefixRows(keys, values, heads)


def prepare(model: Any, anatomy: Anatomy, rows: int) -> bool:
    """Makes a fresh model ready to be traced; ``rows`` is the longest sequence, prompt included.

    Says whether its attention modules got a forward of their own here.
    """
    positions = family_named(anatomy.family).positions
    own = {"bias": _prepare_mpnet, "disentangled": _prepare_deberta}.get(positions)
    if own is not None:
        own(model, rows)
    elif positions == "rotary":
        _prepare_modernbert(model)
    return own is not None


class Distances(nn.Module):
    """``table`` [2 M - 1] holds what stands for the distance ``i - j`` between two of M rows at ``i - j + M - 1``."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, rows: int) -> Tensor:
        """[rows, rows]: the entry for row i (first) and row j."""
        at = torch.arange(rows)
        return self.table[at[:, None] - at[None, :] + self.table.shape[0] // 2]


def _distances(rows: int) -> Tensor:
    return torch.arange(1 - rows, rows)


def _prepare_mpnet(model: Any, rows: int) -> None:
    encoder = model.encoder
    compat.patch(encoder, "compute_position_bias", compat.nothing)
    encoder.distances = Distances(compat.mpnet_buckets(-_distances(rows)))
    for layer in encoder.layer:
        module = layer.attention.attn
        module.shared = [encoder]  # in a list: not to be registered as a submodule
        compat.patch(module, "forward", MethodType(_attend_mpnet, module))


def _attend_mpnet(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
    """MPNetSelfAttention.forward: [B, R, H] -> ([B, R, H],)."""
    encoder = self.shared[0]
    query, key, value = (_by_head(p(hidden_states), self.num_attention_heads) for p in (self.q, self.k, self.v))
    bias = encoder.relative_attention_bias(encoder.distances(hidden_states.shape[1])).permute(2, 0, 1)[None]
    scale = self.attention_head_size**-0.5
    out = attend(query, key, value, self.scene, self.prefix_rows, scale=scale, bias=bias)
    return (self.o(out.flatten(2)),)


def _prepare_deberta(model: Any, rows: int) -> None:
    encoder = model.encoder
    compat.patch(encoder, "get_attention_mask", lambda mask: mask)
    compat.patch(encoder, "get_rel_pos", compat.nothing)
    if encoder.relative_attention:
        distances, buckets = _distances(rows), encoder.position_buckets
        if buckets > 0 and encoder.max_relative_positions > 0:
            distances = compat.deberta_buckets(distances, buckets, encoder.max_relative_positions)
        encoder.distances = Distances(distances.long())
    for layer in encoder.layer:
        module = layer.attention.self
        module.shared = [encoder]
        compat.patch(module, "forward", MethodType(_attend_deberta, module))


def _attend_deberta(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """DisentangledSelfAttention.forward: [B, R, H] -> ([B, R, H], None)."""
    projections = (self.query_proj, self.key_proj, self.value_proj)
    query, key, value = (_by_head(p(hidden_states), self.num_attention_heads) for p in projections)
    factor = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)
    scale = float(query.shape[-1] * factor) ** -0.5
    bias = _disentangled(self, query, key) * scale if self.relative_attention and factor > 1 else None
    out = attend(query, key, value, self.scene, self.prefix_rows, scale=scale, bias=bias)
    return out.flatten(2), None


def _disentangled(self: Any, query: Tensor, key: Tensor) -> Tensor:
    """Content-to-position and position-to-content scores [B, heads, R, R], not yet scaled (He et al. 2021)."""
    encoder, span, heads = self.shared[0], self.pos_ebd_size, self.num_attention_heads
    rows: Tensor = encoder.get_rel_embedding()[None, : 2 * span]
    distance = encoder.distances(query.shape[2])
    shape = (query.shape[0], heads, query.shape[2], query.shape[2])
    terms = []
    if "c2p" in self.pos_att_type:
        keys = _by_head((self.key_proj if self.share_att_key else self.pos_key_proj)(rows), heads)
        index = torch.clamp(distance + span, 0, 2 * span - 1)
        terms.append((query @ keys.transpose(-1, -2)).gather(-1, index.expand(shape)))
    if "p2c" in self.pos_att_type:
        queries = _by_head((self.query_proj if self.share_att_key else self.pos_query_proj)(rows), heads)
        index = torch.clamp(-distance + span, 0, 2 * span - 1)
        terms.append((key @ queries.transpose(-1, -2)).gather(-1, index.expand(shape)).transpose(-1, -2))
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """[B, R, H] -> [B, heads, R, D]."""
    return rows.view(*rows.shape[:-1], heads, -1).transpose(1, 2)


def _prepare_modernbert(model: Any) -> None:
    """Rotations of global and local layers are made in a fixed order: the model walks a set of strings, whose order
    changes from process to process, and the exported bytes with it."""
    rotate, kinds = model.rotary_emb.forward, sorted(set(model.config.layer_types))
    made: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(x: Tensor, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        if kind not in made:
            made.update({other: rotate(x, positions, other) for other in kinds})
        return made.pop(kind)

    compat.patch(model.rotary_emb, "forward", forward)


class Scene:
    """What the attention modules of one graph look at while a batch passes through them."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None
        self._masks: dict[int | None, Tensor] = {}

    def enter(self, seen: Tensor) -> None:
        """A batch begins: ``seen`` [B, R] is true for rows that are no padding."""
        self._seen, self._masks = seen, {}

    def mask(self, window: int | None) -> Tensor:
        """[B, 1, 1 or R, R], 0 where a row may look and the lowest float where not; made once a batch.

        Not minus infinity: rows of padding that see nothing would be NaN and spread.
        """
        assert self._seen is not None
        if window not in self._masks:
            may = self._seen[:, None, None, :]
            if window is not None:
                at = torch.arange(self._seen.shape[1])
                may = may & ((at[:, None] - at[None, :]).abs() <= window)
            self._masks[window] = torch.zeros(()).masked_fill(~may, torch.finfo(torch.float32).min)
        return self._masks[window]


class PrefixRows(nn.Module):
    """The trained keys and values of one layer, [1, heads, V, D] each."""

    def __init__(self, keys: Tensor, values: Tensor, heads: int) -> None:
        super().__init__()
        self.keys, self.values = (
            nn.Parameter(_attention_by_head(rows, heads), requires_grad=False) for rows in (keys, values)
        )

    @property
    def length(self) -> int:
        """V."""
        return self.keys.shape[2]


def _attention_by_head(rows: Tensor, heads: int) -> Tensor:
    return rows.detach().float().view(1, rows.shape[0], heads, -1).transpose(1, 2).contiguous()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scene: Scene,
    prefix: PrefixRows | None,
    *,
    scale: float,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """query, key, value [B, heads, R, D]; ``bias`` [B or 1, heads, R, R] is added to the scaled scores.

    ``window`` lets a row see only rows at most that far away; the prefix is always seen. Returns [B, R, heads, D].
    """
    mask = scene.mask(window)
    if bias is not None:
        mask = mask + bias
    if prefix is not None:
        batch = (query.shape[0], -1, -1, -1)
        key = torch.cat([prefix.keys.expand(batch), key], 2)
        value = torch.cat([prefix.values.expand(batch), value], 2)
        mask = F.pad(mask, (prefix.length, 0))
    scores = (query * scale) @ key.transpose(-1, -2) + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key, value [B, heads, R, D] -> [B, R, heads, D]."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = None if sliding_window is None else sliding_window - 1
    return attend(query, key, value, module.scene, module.prefix_rows, scale=scale, window=window), None


class Product(nn.Module):
    """``x weight + bias`` for x [..., K]; weight [K, N], bias [N] or ``None``.

    Where a linear were exported, the exporter would transpose its weight and give the result a name of its own.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def as_products(module: nn.Module) -> None:
    """Replaces every linear inside a module, in place; names of parameters stay what they were."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Product(child))
        else:
            as_products(child)


def plain_model(kind: type[Any], config: Any, state: Mapping[str, Tensor], attention: str) -> Any:
    """A headless HuggingFace model of class ``kind``, float32, on CPU, not training.

    ``state`` is a state dict of that model; biases that the class does not have are added to the linears and norms
    that it names. ``attention`` is a name that transformers' attention interface knows (``eager``, ``sdpa``).
    """
    config = copy.deepcopy(config)
    compat.use_attention(config, attention)
    with torch.random.fork_rng(devices=[]):
        model = kind(config)
    model.pooler = None
    shrink(model, state)
    for name in state.keys() - model.state_dict().keys():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "bias" and isinstance(module, nn.Linear | nn.LayerNorm):
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0]))
    model.load_state_dict(dict(state))
    return model.float().eval().requires_grad_(False)


def task_model(parts: ExportInputs, name: str, attention: str) -> Any:
    """HuggingFace's task model of class ``name`` on the weights and the head of ``parts``, whose delta is merged.

    float32, on CPU, not training. Raises Unsupported where ``parts`` have a tensor that the class has no place for, and
    VerificationError where the class has one that they lack: what it adds to an answer would be missing.
    """
    import transformers

    config = copy.deepcopy(parts.config)
    config.num_labels = parts.task.outputs
    compat.use_attention(config, attention)
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, name)(config)
    head: dict[str, Tensor] = {name: tensor.detach() for name, _, tensor in parts.head.named()}
    state = {f"{model.base_model_prefix}.{name}": tensor for name, tensor in parts.state.items()} | head
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected:
        raise Unsupported(f"{name} has no place for {unexpected[0]}; give another delta")
    if missing:
        raise VerificationError(
            f"transformers' {name} also has {missing[0]}, which the delta is answered without here; nothing was "
            "published: report it"
        )
    return model.float().eval().requires_grad_(False)


_CHATTY = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding")
_KNOWN = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    (UserWarning, "# The axis name: (batch|sequence) will not be used"),
)


def to_onnx(graph: Graph, opset: int) -> onnx_ir.Model:
    """Exports a graph with dynamic batch and sequence; weights are called as ``Graph.names`` says.

    Raises Unsupported where torch cannot trace or translate the model.
    """
    inputs = graph.inputs
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    example = tuple(torch.ones(2, 9, dtype=torch.int64) for _ in inputs)
    with _quiet(), torch.no_grad():
        model = _traced(graph, example, opset, dynamic_shapes=tuple(sizes for _ in inputs))
        _simplify(model)
    _rename(model, graph.names)
    common.ClearMetadataAndDocStringPass()(model)
    return model


def _traced(graph: Graph, example: tuple[torch.Tensor, ...], opset: int, dynamic_shapes: Any) -> onnx_ir.Model:
    try:
        program = torch.onnx.export(
            graph,
            example,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=opset,
            dynamic_shapes=dynamic_shapes,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0][:200]
        raise Unsupported(f"torch cannot turn {type(graph.model).__name__} into ONNX: {reason}") from error
    assert program is not None
    model: onnx_ir.Model = program.model
    return model


def _simplify(model: onnx_ir.Model) -> None:
    """onnxscript's optimiser, but equal small weights stay apart: each tensor of a delta is found under its name."""
    weights = set(model.graph.initializers)
    optimizer.fold_constants(model)
    rewriter.rewrite(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _deduplicate(model, weights)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def _deduplicate(model: onnx_ir.Model, weights: set[str]) -> None:
    """One initialiser for equal constants that the exporter made."""
    first: dict[tuple[str, tuple[object, ...], bytes], onnx_ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if name in weights or tensor is None:
            continue
        kept = first.setdefault((str(tensor.dtype), tuple(tensor.shape), tensor.tobytes()), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del model.graph.initializers[name]


def _rename(model: onnx_ir.Model, names: Mapping[str, str]) -> None:
    for path, name in names.items():
        if path in model.graph.initializers:
            model.graph.initializers[path].name = name


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter says of itself: two warnings, and log lines about torchvision and about folding."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind, message in _KNOWN:
                warnings.filterwarnings("ignore", message, kind)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
