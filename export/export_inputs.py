"""What an exported file is made of: the encoder's weights with a delta folded into them, what stands beside, the head.

Folding sums ``W + Bᵀ A`` and ``b + Δb`` in float64 from the pristine base and rounds to float32 once: merging in half
precision loses up to 70 % of a small delta.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from bertology_serve import examples
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.bank import BARE, DeltaBank
from bertology_serve.encoder.batch import PackedBatch
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.export.export_spec import ON_CPU, Precision
from bertology_serve.export.session import END, LOGITS, POOLED, ROWS, SPARSE_WEIGHTS, START, VECTORS
from bertology_serve.families import family_named
from bertology_serve.families.family import Family
from bertology_serve.kinds.effects import Effects
from bertology_serve.kinds.slots import BEHIND_NORMS, Anatomy, Slot
from bertology_serve.tasks.encoding import encode_text
from bertology_serve.tasks.heads import Head
from bertology_serve.tasks.spec import MULTI_VECTOR, POOLED_KINDS, QUESTION_ANSWERING, SPARSE, Encoding, TaskSpec

WORDS = ("embeddings.word_embeddings.weight", "embeddings.tok_embeddings.weight")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class ExportInputs:
    """An encoder's weights, what of a delta is not folded into them, and the head.

    ``state`` are float32 CPU tensors by their names in the headless HuggingFace model of class ``kind`` with
    ``config``; ``effects`` stand beside them. ``own_head`` names the head's tensors that are the delta's. ``columns``
    [K], by the path of a linear, divide what it reads and multiply its weight before both are rounded to 8 bits.
    """

    delta: str
    task: TaskSpec
    kind: type[Any]
    config: Any
    anatomy: Anatomy
    state: Mapping[str, Tensor]
    effects: Effects
    head: Head
    own_head: frozenset[str]
    inputs: tuple[str, ...]
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, encoder: Encoder, delta: Delta, merge: bool, precision: Precision = "fp32") -> ExportInputs:
        """With ``merge`` low ranks, biases and factors are folded into the weights; all else stays beside them.

        ``columns`` are made for the precisions in which a row, or all rows, share one scale.
        """
        anatomy, effects = encoder.anatomy, delta.effects(encoder.anatomy)
        state = fold(encoder.model.state_dict(), effects if merge else Effects(), anatomy)
        if merge:
            effects = Effects(bottleneck=effects.bottleneck, prompt=effects.prompt, prefix=effects.prefix)
        head = encoder.head(delta.task)
        head.load(delta.head)
        return cls(
            delta=delta.name,
            task=delta.task,
            kind=type(encoder.model),
            config=encoder.config,
            anatomy=anatomy,
            state=state,
            effects=effects,
            head=head.eval(),
            own_head=frozenset(delta.head),
            inputs=INPUTS if _typed(encoder) and delta.task.token_types else INPUTS[:2],
            columns=column_scales(encoder, state) if precision in ON_CPU else {},
        )

    @property
    def family(self) -> Family:
        """What the encoder's family does in its own way."""
        return family_named(self.anatomy.family)

    @property
    def positions(self) -> str:
        """How attention knows distances (``Family.positions``): DeBERTa's may be told not to."""
        told = self.family.positions
        return told if told != "disentangled" or getattr(self.config, "relative_attention", False) else ""

    @property
    def activation(self) -> str:
        names = ("hidden_activation", "hidden_act", "activation")
        return next(str(getattr(self.config, name)) for name in names if hasattr(self.config, name))

    @property
    def outputs(self) -> dict[str, tuple[str | int, ...]]:
        """The outputs' names, which are those that HuggingFace's tools look for, and their shapes, in order.

        ``session.answer`` reads them.
        """
        task, hidden = self.task, self.anatomy.hidden
        if task.kind == QUESTION_ANSWERING:
            return dict.fromkeys((START, END), ("batch", "sequence"))
        if task.kind in POOLED_KINDS:
            return {ROWS: ("batch", "sequence", hidden), POOLED: ("batch", hidden)}
        name = {SPARSE: SPARSE_WEIGHTS, MULTI_VECTOR: VECTORS}.get(task.kind, LOGITS)
        return {name: ("batch", "sequence", task.outputs) if task.per_token else ("batch", task.outputs)}

    @property
    def words(self) -> str:
        return next(name for name in WORDS if name in self.state)

    @property
    def first_position(self) -> int:
        """The position of the first row; a prefix may shift it."""
        prefix = self.effects.prefix
        shifted = prefix is not None and prefix.positions == "shifted"
        return self.anatomy.position_offset + (int(prefix.keys.shape[1]) if prefix is not None and shifted else 0)

    def named(self, tensor: str) -> str:
        """The name in the file of a tensor that is the delta's."""
        return f"delta.{self.delta}.{tensor}"

    def named_in_head(self, tensor: str) -> str:
        """The name in the file of a head's tensor, given that in HuggingFace's task model."""
        return self.named(f"head.{tensor}") if tensor in self.own_head else tensor


def _typed(encoder: Encoder) -> bool:
    """Whether token types change anything: the model has more than one and the tokenizer tells them apart."""
    types = int(getattr(encoder.config, "type_vocab_size", 0) or 0)
    return types > 1 and "token_type_ids" in encoder.tokenizer.model_input_names


SETS = ("sentiment", "intent", "similarity")
CALIBRATED, SHARE, SMALLEST = 16, 0.65, 1e-5
"""How many texts of the built-in examples the largest inputs are taken from; how much of a column's size moves into the
weights (0: nothing, 1: all; from 0.6 to 0.7 MiniLM and MPNet are nearest to float32)."""


def column_scales(encoder: Encoder, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Column scales [K] of the linears that a LayerNorm feeds, by path: SmoothQuant (Xiao et al. 2023).

    ``max |x|^SHARE / max |W|^(1 - SHARE)`` of each column, x from plain English sentences without a delta. LayerNorms
    give a few columns far larger than the rest, which would take all 8 bits of a row.
    """
    largest, scales = _largest_inputs(encoder), dict[str, Tensor]()
    for slots in BEHIND_NORMS:
        found = [slot for name, slot in encoder.anatomy.slots.items() if name in slots]
        for layer in range(encoder.anatomy.layers):
            paths = list(dict.fromkeys(path for slot in found if (path := slot.paths[layer]) is not None))
            inputs = torch.stack([largest[path] for path in paths]).amax(0).clamp(min=SMALLEST)
            weights = torch.cat([state[f"{path}.weight"] for path in paths]).abs().amax(0).clamp(min=SMALLEST)
            scales |= dict.fromkeys(paths, inputs**SHARE / weights ** (1 - SHARE))
    return scales


def calibration(encoder: Encoder) -> PackedBatch:
    """The sentences that columns are calibrated on, in one batch."""
    texts = plain_texts(encoder, CALIBRATED)
    return encoder.pack(texts, [BARE] * len(texts))


def _largest_inputs(encoder: Encoder) -> dict[str, Tensor]:
    """max |x| [K] of each column that a linear reads, by its path."""
    largest = dict[str, Tensor]()

    def see(path: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found = given[0].detach().reshape(-1, given[0].shape[-1]).abs().amax(0).float().cpu()
        largest[path] = torch.maximum(largest.get(path, found), found)

    slots = (slot for name, slot in encoder.anatomy.slots.items() if name in chain(*BEHIND_NORMS))
    paths = {path for slot in slots for path in slot.paths if path is not None}
    with encoder.lock, torch.inference_mode():
        hooks = [encoder.model.get_submodule(path).register_forward_pre_hook(partial(see, path)) for path in paths]
        try:
            encoder.run(calibration(encoder), DeltaBank(encoder.anatomy, encoder.dtype, encoder.device))
        finally:
            for hook in hooks:
                hook.remove()
    return largest


def plain_texts(encoder: Encoder, count: int) -> list[Encoding]:
    """English sentences of the built-in examples, at most so many: what scales are taken from."""
    sets = [examples.path(name, "train").read_text(encoding="utf-8").splitlines() for name in SETS]
    texts = [json.loads(line)["text"] for line in islice(chain(*sets), count)]
    return [encode_text(encoder.tokenizer, text, None, encoder.max_tokens) for text in texts]


def fold(state: Mapping[str, Tensor], effects: Effects, anatomy: Anatomy) -> dict[str, Tensor]:
    """The encoder's weights with a delta's low ranks, biases and factors in them: float32 CPU tensors, the same names.

    ``state`` is the untouched state dict of the headless model. Biases that the encoder lacks are added under the
    name that they would have. Adapters, prompts and prefixes of ``effects`` are not looked at: they cannot be folded.
    """
    sums = _Sums(state)
    for name, factors in effects.scale.items():
        _scale(sums, anatomy.slot(name), factors.double())
    for name, update in effects.low_rank.items():
        slot = anatomy.slot(name)
        for layer in slot.present:
            a, b = update.at(slot, layer)
            change = b.double().T @ a.double()
            sums.rows(slot, layer, "weight").add_(change.to(sums.device))
    for name, factors in effects.inner.items():
        slot = anatomy.slot(name)
        for layer in slot.present:
            factor = 1.0 + factors[layer, : slot.inputs_of(layer)].double().to(sums.device)
            sums.rows(slot, layer, "weight").mul_(factor)
    for name, shift in effects.bias.items():
        slot = anatomy.slot(name)
        for layer in slot.present:
            sums.rows(slot, layer, "bias").add_(shift[layer, : slot.outputs_of(layer)].double().to(sums.device))
    return sums.result()


def _scale(sums: _Sums, slot: Slot, factors: Tensor) -> None:
    """The factors [L, N] on a linear's own output; on a LayerNorm's weight, what is added to it."""
    for layer in slot.present:
        own = factors[layer, : slot.outputs_of(layer)].to(sums.device)
        if not slot.inputs:
            sums.rows(slot, layer, "weight").add_(own)
            continue
        sums.rows(slot, layer, "weight").mul_(1.0 + own[:, None])
        if slot.has_bias:
            sums.rows(slot, layer, "bias").mul_(1.0 + own)


class _Sums:
    """The weights, those that a delta touches in float64."""

    device = torch.device("cpu")

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state, self.touched = state, dict[str, Tensor]()

    def rows(self, slot: Slot, layer: int, name: str) -> Tensor:
        """A view of the output rows that a slot names, of one layer's weight [N, K] or bias [N]."""
        path = f"{slot.paths[layer]}.{name}"
        if path not in self.touched:
            self.touched[path] = self._start(slot, layer, path)
        whole = self.touched[path]
        return whole if slot.part is None else whole[slot.part[0] : slot.part[1]]

    def _start(self, slot: Slot, layer: int, path: str) -> Tensor:
        if path in self.state:
            return self.state[path].detach().to(self.device, torch.float64, copy=True)
        outputs = self.state[f"{slot.paths[layer]}.weight"].shape[0]
        return torch.zeros(outputs, dtype=torch.float64)

    def result(self) -> dict[str, Tensor]:
        untouched = {
            name: tensor.detach().to(self.device, torch.float32) if tensor.is_floating_point() else tensor
            for name, tensor in self.state.items()
            if name not in self.touched
        }
        return untouched | {name: tensor.float() for name, tensor in self.touched.items()}
