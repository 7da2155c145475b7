"""What an exported file is made of, whichever back end writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import Unsupported
from bertology_serve.export.fold import fold
from bertology_serve.export.session import END, LOGITS, POOLED, ROWS, START
from bertology_serve.families import family_named
from bertology_serve.families.family import Family
from bertology_serve.kinds.effects import Effects
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.heads import Head
from bertology_serve.tasks.spec import EMBEDDING, QUESTION_ANSWERING, TaskSpec

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class ExportInputs:
    """An encoder's weights, what of a delta is not folded into them, and the head.

    ``state`` are float32 CPU tensors by their names in the headless HuggingFace model of class ``kind`` with
    ``config``; ``effects`` stand beside them. ``own_head`` names the head's tensors that are the delta's.
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

    @property
    def family(self) -> Family:
        """What the encoder's family does in its own way."""
        return family_named(self.anatomy.family)

    @property
    def outputs(self) -> dict[str, tuple[str | int, ...]]:
        """The outputs' names, which are those that HuggingFace's tools look for, and their shapes, in order.

        ``session.answer`` reads them.
        """
        task, hidden = self.task, self.anatomy.hidden
        if task.kind == QUESTION_ANSWERING:
            return dict.fromkeys((START, END), ("batch", "sequence"))
        if task.kind == EMBEDDING:
            return {ROWS: ("batch", "sequence", hidden), POOLED: ("batch", hidden)}
        return {LOGITS: ("batch", "sequence", task.outputs) if task.per_token else ("batch", task.outputs)}

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


def parts_of(encoder: Encoder, delta: Delta, merge: bool) -> ExportInputs:
    """With ``merge`` low ranks and biases are folded into the weights; all else of the delta stays beside them."""
    anatomy, effects = encoder.anatomy, delta.effects(encoder.anatomy)
    if not merge and (effects.scale or effects.inner):
        raise Unsupported(f"delta {delta.name!r} scales the encoder's rows, which no graph holds; give --merge")
    state = fold(encoder.model.state_dict(), effects if merge else Effects(), anatomy)
    if merge:
        effects = Effects(bottleneck=effects.bottleneck, prompt=effects.prompt, prefix=effects.prefix)
    head = encoder.head(delta.task)
    head.load(delta.head)
    return ExportInputs(
        delta=delta.name,
        task=delta.task,
        kind=type(encoder.model),
        config=encoder.config,
        anatomy=anatomy,
        state=state,
        effects=effects,
        head=head.eval(),
        own_head=frozenset(delta.head),
        inputs=INPUTS if _typed(encoder) else INPUTS[:2],
    )


def _typed(encoder: Encoder) -> bool:
    """Whether token types change anything: the model has more than one and the tokenizer tells them apart."""
    types = int(getattr(encoder.config, "type_vocab_size", 0) or 0)
    return types > 1 and "token_type_ids" in encoder.tokenizer.model_input_names
