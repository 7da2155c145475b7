"""How a delta's tensors are named and shaped in ``adapter_model.safetensors``: as peft does, where peft has the kind.

* LoRA: ``{root}{module}.lora_A.weight`` [R, K] and ``.lora_B.weight`` [N, R], one pair a module. Slots that are
  slices of one packed module share its pair: the A blocks stand one above the other, B is block-diagonal with zero
  rows where no slot reaches, so r' = n R.
* IA3: ``{root}{module}.ia3_l`` [N, 1], of a feedforward module [1, K].
* BitFit on linear projections only: ``{root}{module}.beft_bias`` [1, N].
* a soft prompt or prefix that works as peft's does: ``prompt_embeddings`` [V, E], or [V, 2 L H] with layer i's keys
  in block 2i and its values in block 2i + 1.
* everything else: ``bertology.{kind}.{name}``, shaped as in memory.
* heads: ``base_model.model.{HuggingFace name}``; beside ``prompt_embeddings`` alone ``base_model.{HuggingFace name}``.

``root`` is ``base_model.model.{prefix}.``; embedding models have no prefix. Reading gives back what was written, bit
for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bertology_serve.deltas.bitfit import BitfitSpec
from bertology_serve.deltas.ia3 import Ia3Spec
from bertology_serve.deltas.ia3_modules import read_ia3, write_ia3
from bertology_serve.deltas.kind import Tensors
from bertology_serve.deltas.kinds import kind_of
from bertology_serve.deltas.lora import LoraSpec
from bertology_serve.deltas.modules import is_beft, read_beft, read_lora, take, write_beft, write_lora
from bertology_serve.deltas.names import OWN_PREFIX
from bertology_serve.deltas.prefix import PrefixSpec
from bertology_serve.deltas.prompt import PromptSpec
from bertology_serve.deltas.slots import KEY, Anatomy
from bertology_serve.errors import FormatError

MODEL_ROOT, PROMPT_ROOT = "base_model.model.", "base_model."
PROMPT_EMBEDDINGS = "prompt_embeddings"


def as_peft_does(specs: Sequence[Any]) -> str | None:
    """``prompt`` or ``prefix`` where the delta has exactly one of the two and it works as peft's does."""
    learned = [spec for spec in specs if isinstance(spec, PromptSpec | PrefixSpec)]
    if len(learned) != 1 or learned[0].positions != "shifted":
        return None
    spec = learned[0]
    if isinstance(spec, PromptSpec) and (spec.placement, spec.head_reads) != ("before_cls", "first_row"):
        return None
    return kind_of(spec).name


def head_root(specs: Sequence[Any]) -> str:
    """What the names of head tensors begin with."""
    return PROMPT_ROOT if len(specs) == 1 and as_peft_does(specs) else MODEL_ROOT


def to_disk(tensors: Mapping[str, Tensor], specs: Sequence[Any], anatomy: Anatomy, root: str) -> Tensors:
    """The components' tensors under their names on disk."""
    written: Tensors = {}
    for spec in specs:
        kind = kind_of(spec).name
        own = {n.removeprefix(f"{kind}."): t for n, t in tensors.items() if n.startswith(f"{kind}.")}
        if isinstance(spec, LoraSpec):
            written |= write_lora(own, spec, anatomy, root)
        elif isinstance(spec, BitfitSpec) and is_beft(spec, anatomy):
            written |= write_beft(own, spec, anatomy, root)
        elif isinstance(spec, Ia3Spec):
            written |= write_ia3(own, spec, anatomy, root)
        elif as_peft_does(specs) == kind:
            written[PROMPT_EMBEDDINGS] = own["vectors"] if kind == "prompt" else join_prefix(own)
        else:
            written |= {f"{OWN_PREFIX}{kind}.{name}": tensor for name, tensor in own.items()}
    return {name: tensor.contiguous() for name, tensor in written.items()}


def from_disk(written: Tensors, specs: Sequence[Any], anatomy: Anatomy, root: str) -> Tensors:
    """The inverse of ``to_disk``; takes what it reads out of ``written``. Raises FormatError for what is missing."""
    tensors: Tensors = {}
    for spec in specs:
        kind = kind_of(spec).name
        if isinstance(spec, LoraSpec):
            own = read_lora(written, spec, anatomy, root)
        elif isinstance(spec, BitfitSpec) and is_beft(spec, anatomy):
            own = read_beft(written, spec, anatomy, root)
        elif isinstance(spec, Ia3Spec):
            own = read_ia3(written, spec, anatomy, root)
        elif as_peft_does(specs) == kind:
            found = take(written, PROMPT_EMBEDDINGS)
            own = {"vectors": found} if kind == "prompt" else split_prefix(found, anatomy)
        else:
            start = f"{OWN_PREFIX}{kind}."
            own = {name.removeprefix(start): written.pop(name) for name in list(written) if name.startswith(start)}
        tensors |= {f"{kind}.{name}": tensor for name, tensor in own.items()}
    return tensors


def join_prefix(own: Mapping[str, Tensor]) -> Tensor:
    """``keys`` and ``values`` [L, V, H] as peft's [V, 2 L H]."""
    both = torch.stack([own["keys"], own["values"]], 1)
    return both.permute(2, 0, 1, 3).reshape(both.shape[2], -1)


def split_prefix(embeddings: Tensor, anatomy: Anatomy) -> Tensors:
    """peft's [V, 2 L H] as ``keys`` and ``values`` [L, V, H]."""
    width = anatomy.slot(KEY).outputs
    wanted = 2 * anatomy.layers * width
    if embeddings.dim() != 2 or embeddings.shape[1] != wanted:
        raise FormatError(f"{PROMPT_EMBEDDINGS} has shape {list(embeddings.shape)}; expected [V, {wanted}]")
    both = embeddings.view(-1, anatomy.layers, 2, width).permute(2, 1, 0, 3)
    return {"keys": both[0].contiguous(), "values": both[1].contiguous()}
