"""ONNX by torch's own exporter, for encoders that the emitter cannot write: padded, in float32, in seconds.

The model is HuggingFace's, run as it stands. A delta that is not folded hangs on its modules as forward hooks.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from torch import Tensor, nn
from torch.nn import functional as F

from bertology_serve.encoder.anatomy import attention_modules
from bertology_serve.encoder.attention import repeated
from bertology_serve.errors import Unsupported
from bertology_serve.export.emitter.row_nodes import PromptLayout
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.hf_model import hf_model
from bertology_serve.families import compat
from bertology_serve.kernels.segments import ACTIVATIONS
from bertology_serve.kinds.slots import KEY, Slot
from bertology_serve.tasks.spec import POOLED_KINDS, QUESTION_ANSWERING, SPARSE

LOWEST = torch.finfo(torch.float32).min
Change = Callable[[Tensor, Tensor], Tensor]
"""What a delta makes of a module's output, given its input."""


class Graph(nn.Module):
    """An encoder with one delta, its pooling and head, as torch traces it.

    ``forward`` takes ``inputs``, int64 [B, L] each, and returns ``ExportInputs.outputs``, float32, zero at padding.
    ``names`` maps parameters to their names in the file. Raises Unsupported for what it cannot hold.
    """

    def __init__(self, export_inputs: ExportInputs) -> None:
        super().__init__()
        effects, kind = export_inputs.effects, export_inputs.kind
        self.export_inputs, self.task, self.anatomy = export_inputs, export_inputs.task, export_inputs.anatomy
        self.inputs, self.outputs = export_inputs.inputs, tuple(export_inputs.outputs)
        interface = compat.has_interface(kind)
        if effects.scale or effects.inner:
            raise Unsupported(
                f"delta {export_inputs.delta!r} scales rows, which torch's exporter does not; give --merge"
            )
        if effects.prefix is not None and not interface:
            raise Unsupported(f"a prefix cannot be put into a graph of {self.anatomy.family}; train another kind")
        attention = compat.register("bertology_dense", _attend) if interface else "eager"
        self.model = hf_model(kind, export_inputs.config, export_inputs.state, attention)
        self.head = copy.deepcopy(export_inputs.head)
        self.head.tie(self.model.get_input_embeddings().weight)
        heads = {id(parameter): name for name, _, parameter in self.head.named()}
        self.names = {
            path: export_inputs.named_in_head(heads[id(parameter)])
            for path, parameter in self.head.named_parameters(prefix="head")
        } | {f"model.{path}": path for path, _ in self.model.named_parameters()}
        as_products(self)
        self.delta, self._masks = nn.ParameterDict(), Masks()
        self._layout = PromptLayout.of(effects.prompt, export_inputs.first_position)
        self._first_position = export_inputs.first_position
        self._accepted = set(inspect.signature(self.model.forward).parameters)
        if effects.prompt is not None:
            self._mine("prompt.vectors", effects.prompt.vectors[None])
        self._attach()
        modules: list[Any] = attention_modules(self.model, self.anatomy)
        for layer, module in enumerate(modules):
            module.graph, module.layer_number = [self], layer  # in a list: not to be registered as a submodule
        self.eval().requires_grad_(False)

    def _mine(self, name: str, tensor: Tensor) -> Callable[[], Tensor]:
        """Registers a tensor of the delta; what is returned reads it while the graph runs."""
        key = name.replace(".", "-")
        self.delta[key] = nn.Parameter(tensor.detach().to("cpu", torch.float32).contiguous(), requires_grad=False)
        self.names[f"delta.{key}"] = self.export_inputs.named(name)
        return lambda: self.delta[key]

    def _attach(self) -> None:
        """Hooks for low ranks, biases and adapters, and the prefix's tensors."""
        effects, updates, adapters = self.export_inputs.effects, defaultdict(list), defaultdict(list)
        for name in sorted(effects.low_rank.keys() | effects.bias.keys()):
            slot = self.anatomy.slot(name)
            for layer in slot.present:
                updates[str(slot.paths[layer])].append(self._update(slot, layer))
        for name, unit in effects.bottleneck.items():
            for layer in unit.layers:
                adapters[str(self.anatomy.slot(name).paths[layer])].append(self._adapter(name, layer))
        for path in updates.keys() | adapters.keys():
            self.model.get_submodule(path).register_forward_hook(_hook(updates[path], adapters[path]))
        prefix = {"keys": effects.prefix.keys, "values": effects.prefix.values} if effects.prefix else {}
        for layer in range(self.anatomy.layers):
            width = self.anatomy.head_width
            heads = self.anatomy.slot(KEY).outputs_of(layer) // width
            for part, rows in prefix.items():
                by_head = rows[layer, :, : heads * width].reshape(1, -1, heads, width).transpose(1, 2)
                self._mine(f"prefix.{layer}.{part}", by_head)

    def _update(self, slot: Slot, layer: int) -> Change:
        """``y + x a b + bias`` in the columns that a slot names of a packed projection."""
        effects, place = self.export_inputs.effects, f"{slot.name}.{layer}"
        low, shift = effects.low_rank.get(slot.name), effects.bias.get(slot.name)
        a, b = (None, None) if low is None else low.at(slot, layer)
        left = None if a is None else self._mine(f"{place}.a", a.T)
        right = None if b is None else self._mine(f"{place}.b", b)
        bias = None if shift is None else self._mine(f"{place}.bias", shift[layer, : slot.outputs_of(layer)])

        def update(x: Tensor, y: Tensor) -> Tensor:
            added = y.new_zeros(()) if bias is None else bias()
            if left is not None and right is not None:
                added = x @ left() @ right() + added
            return y + (F.pad(added, (slot.part[0], y.shape[-1] - slot.part[1])) if slot.part else added)

        return update

    def _adapter(self, name: str, layer: int) -> Callable[[Tensor], Tensor]:
        """``act(rows down + down_bias) up + up_bias``."""
        unit, place = self.export_inputs.effects.bottleneck[name], f"{name}.{layer}.adapter"
        down, up = self._mine(f"{place}.down", unit.down[layer].T), self._mine(f"{place}.up", unit.up[layer])
        shift = self._mine(f"{place}.down_bias", unit.down_bias[layer])
        out = self._mine(f"{place}.up_bias", unit.up_bias[layer])
        return lambda rows: ACTIVATIONS[unit.activation](rows @ down() + shift()) @ up() + out()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        # padding goes to the end, wherever it was; ``home`` is where each row of the caller's stands then
        mask = attention_mask.ne(0).long()
        passed, at = mask.cumsum(1), torch.arange(input_ids.shape[1])
        count = passed[:, -1:]
        home, seen = torch.where(mask.bool(), passed - 1, count + at - passed), at < count
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        ids, types = (torch.zeros_like(rows).scatter(1, home, rows) for rows in (input_ids, types))
        hidden = self._encode(ids, types, seen)

        def callers(rows: Tensor) -> Tensor:
            rows = rows.masked_fill(~seen[..., None], 0.0)
            return rows.gather(1, home[..., None].expand(-1, -1, rows.shape[-1]))

        if self.task.per_token:
            out = callers(self._unit(self.head(self._text(hidden))))
            return out.unbind(-1) if self.task.kind == QUESTION_ANSWERING else (out,)
        if self.task.kind == SPARSE:
            scores = self.head(self._text(hidden)).masked_fill(~seen[..., None], LOWEST)
            return (scores.amax(1).relu().log1p(),)
        out = self.head(self._pool(hidden, seen, count))
        if self.task.kind not in POOLED_KINDS:
            return (out,)
        return callers(self._text(hidden)), self._unit(out)

    def _unit(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.task.unit else rows

    def _encode(self, ids: Tensor, types: Tensor, seen: Tensor) -> Tensor:
        """The last hidden states [B, R, H]: prompt rows among the text's, padding behind."""
        words, tokens, length = self.model.get_input_embeddings()(ids), ids.shape[1], self._layout.length
        if length:
            words = self._woven(words, self.delta["prompt-vectors"].expand(ids.shape[0], -1, -1))
        seen = self._filled(seen, 1)
        self._masks.enter(seen)
        positions = torch.arange(tokens + length if self._layout.shifted else tokens)[None]
        inputs = {
            "inputs_embeds": words,
            "attention_mask": seen.long(),
            "token_type_ids": self._filled(types, 0),
            "position_ids": (positions if self._layout.shifted else self._filled(positions, 0)) + self._first_position,
        }
        inputs = {name: value for name, value in inputs.items() if name in self._accepted}
        hidden: Tensor = self.model(**inputs).last_hidden_state
        return hidden

    def _woven(self, rows: Tensor, prompt: Tensor) -> Tensor:
        lead = self._layout.lead
        return torch.cat([rows[:, :lead], prompt, rows[:, lead:]], 1)

    def _filled(self, rows: Tensor, value: int) -> Tensor:
        """[B, L] -> [B, R], ``value`` at prompt rows."""
        return self._woven(rows, rows.new_full((1, self._layout.length), value).expand(rows.shape[0], -1))

    def _text(self, hidden: Tensor) -> Tensor:
        """[B, R, H] -> [B, L, H]."""
        lead = self._layout.lead
        return torch.cat([hidden[:, :lead], hidden[:, lead + self._layout.length :]], 1)

    def _pool(self, hidden: Tensor, seen: Tensor, count: Tensor) -> Tensor:
        """[B, R, H] -> [B, H]."""
        if self.task.pooling == "cls":
            return hidden[:, self._layout.first]
        text, padding = self._text(hidden), ~seen[..., None]
        if self.task.pooling == "max":
            return text.masked_fill(padding, LOWEST).amax(1)
        return text.masked_fill(padding, 0.0).sum(1) / count.clamp(min=1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query, key, value [B, heads, R, D] -> [B, R, heads, D]."""
        mask = self._masks(window)
        if self.export_inputs.effects.prefix is not None:
            keys, values = (self.delta[f"prefix-{layer}-{part}"] for part in ("keys", "values"))
            key = torch.cat([keys.expand(query.shape[0], -1, -1, -1), key], 2)
            value = torch.cat([values.expand(query.shape[0], -1, -1, -1), value], 2)
            mask = F.pad(mask, (keys.shape[2], 0))
        key, value = repeated(key, query.shape[1], 1), repeated(value, query.shape[1], 1)
        scores = (query * scale) @ key.transpose(-1, -2) + mask
        return (scores.softmax(-1) @ value).transpose(1, 2)


class Masks:
    """The masks of one batch; apart from the graph, for torch lets no module keep a tensor while it is traced."""

    def __init__(self) -> None:
        self._seen, self._made = torch.empty(0), dict[int | None, Tensor]()

    def enter(self, seen: Tensor) -> None:
        """A batch begins: ``seen`` [B, R] is true for rows that are no padding."""
        self._seen, self._made = seen, {}

    def __call__(self, window: int | None) -> Tensor:
        """[B, 1, 1 or R, R], 0 where a row may look, at most ``window`` rows away, and the lowest float where not."""
        if window not in self._made:
            may = self._seen[:, None, None, :]
            if window is not None:
                at = torch.arange(self._seen.shape[1])
                may = may & ((at[:, None] - at[None, :]).abs() <= window)
            self._made[window] = torch.zeros(()).masked_fill(~may, LOWEST)
        return self._made[window]


def _hook(
    updates: list[Change], adapters: list[Callable[[Tensor], Tensor]]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook; a norm is used again around an adapter: ``LN(adapter(LN(x)) + x)``."""

    def changed(x: Tensor, y: Tensor) -> Tensor:
        for update in updates:
            y = update(x, y)
        return y

    def hook(module: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> Tensor:
        y = changed(given[0], y)
        for adapter in adapters:
            if isinstance(module, nn.LayerNorm):
                again = adapter(y) + given[0]
                y = changed(again, module.forward(again))
            else:
                y = y + adapter(y)
        return y

    return hook


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = None if sliding_window is None else sliding_window - 1
    return module.graph[0].attend(module.layer_number, query, key, value, scale, window), None


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


_CHATTY = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding")
_KNOWN = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    (UserWarning, "# The axis name: (batch|sequence) will not be used"),
)


def to_onnx(graph: Graph, opset: int) -> onnx_ir.Model:
    """The model with dynamic batch and sequence; weights are called as ``Graph.names`` says.

    Raises Unsupported where torch cannot trace or translate the model.
    """
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                graph,
                tuple(torch.ones(2, 9, dtype=torch.int64) for _ in graph.inputs),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=opset,
                dynamic_shapes=tuple(sizes for _ in graph.inputs),
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0][:200]
            raise Unsupported(f"torch cannot turn {type(graph.model).__name__} into ONNX: {reason}") from error
        assert program is not None
        model: onnx_ir.Model = program.model
        _simplify(model)
    for path, name in graph.names.items():
        if path in model.graph.initializers:
            model.graph.initializers[path].name = name
    common.ClearMetadataAndDocStringPass()(model)
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
