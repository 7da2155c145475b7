"""How a delta's tensors are named and shaped on disk (as peft does, where peft has the kind), and checks of that.

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

import torch
from torch import Tensor

from bertology_serve.deltas.delta import BaseRef, Delta
from bertology_serve.deltas.interop.peft_tensors import (
    is_beft,
    read_beft,
    read_ia3,
    read_lora,
    take,
    write_beft,
    write_ia3,
    write_lora,
)
from bertology_serve.deltas.names import OWN_PREFIX
from bertology_serve.errors import BaseMismatch, FormatError, SpecError, nearest
from bertology_serve.files import JsonObject
from bertology_serve.kinds import kinds
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.kind import Spec, Tensors
from bertology_serve.kinds.kinds import kind_of
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.kinds.slots import KEY, Anatomy
from bertology_serve.tasks.heads import Dense, head_form
from bertology_serve.tasks.spec import TaskSpec

MODEL_ROOT, PROMPT_ROOT = "base_model.model.", "base_model."
PROMPT_EMBEDDINGS = "prompt_embeddings"


def as_peft_does(specs: Sequence[Spec]) -> str | None:
    """``prompt`` or ``prefix`` where the delta has exactly one of the two and it works as peft's does."""
    learned = [spec for spec in specs if isinstance(spec, Prompt | Prefix)]
    if len(learned) != 1 or learned[0].positions != "shifted":
        return None
    spec = learned[0]
    if isinstance(spec, Prompt) and (spec.placement, spec.head_reads) != ("before_cls", "first_row"):
        return None
    return kind_of(spec).name


def head_root(specs: Sequence[Spec]) -> str:
    """What the names of head tensors begin with."""
    return PROMPT_ROOT if len(specs) == 1 and as_peft_does(specs) else MODEL_ROOT


def to_disk(tensors: Mapping[str, Tensor], specs: Sequence[Spec], anatomy: Anatomy, root: str) -> Tensors:
    """The components' tensors under their names on disk."""
    written: Tensors = {}
    for spec in specs:
        kind = kind_of(spec).name
        own = {n.removeprefix(f"{kind}."): t for n, t in tensors.items() if n.startswith(f"{kind}.")}
        if isinstance(spec, Lora):
            written |= write_lora(own, spec, anatomy, root)
        elif isinstance(spec, Bitfit) and is_beft(spec, anatomy):
            written |= write_beft(own, spec, anatomy, root)
        elif isinstance(spec, Ia3):
            written |= write_ia3(own, spec, anatomy, root)
        elif as_peft_does(specs) == kind:
            written[PROMPT_EMBEDDINGS] = own["vectors"] if kind == "prompt" else join_prefix(own)
        else:
            written |= {f"{OWN_PREFIX}{kind}.{name}": tensor for name, tensor in own.items()}
    return {name: tensor.contiguous() for name, tensor in written.items()}


def from_disk(written: Tensors, specs: Sequence[Spec], anatomy: Anatomy, root: str) -> Tensors:
    """The inverse of ``to_disk``; takes what it reads out of ``written``. Raises FormatError for what is missing."""
    tensors: Tensors = {}
    for spec in specs:
        kind = kind_of(spec).name
        if isinstance(spec, Lora):
            own = read_lora(written, spec, anatomy, root)
        elif isinstance(spec, Bitfit) and is_beft(spec, anatomy):
            own = read_beft(written, spec, anatomy, root)
        elif isinstance(spec, Ia3):
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


Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def expected_shapes(specs: Sequence[Spec], anatomy: Anatomy) -> dict[str, tuple[int, ...]]:
    """The components' shapes by name, nothing allocated; FormatError where the encoder cannot have such components."""
    try:
        return shapes_of(kinds.init(specs, anatomy, None))
    except (SpecError, RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise FormatError(f"the kinds do not fit the encoder: {str(error).splitlines()[0][:200]}") from None


def check_shapes(found: Shapes, expected: Shapes, what: str) -> None:
    """Raises FormatError for a tensor that is missing, unknown or of another shape."""
    for name in found.keys() - expected.keys():
        hint = nearest(name[:120], expected) if expected else "expected none"
        raise FormatError(f"{what}: unknown tensor {name[:120]!r}; {hint}")
    for name, shape in expected.items():
        if name not in found:
            raise FormatError(f"{what}: the tensor {name!r} is missing; expected {list(shape)}")
        if found[name] != shape:
            raise FormatError(f"{what}: the tensor {name!r} has shape {list(found[name])}; expected {list(shape)}")


def check_head(head: Shapes, task: TaskSpec, anatomy: Anatomy, options: JsonObject) -> None:
    """Raises FormatError for a head's tensor that is unknown, misshapen or missing.

    ``head`` are shapes by HuggingFace name, ``options`` values of the encoder's configuration. Parts that the base
    checkpoint may bring (BERT's pooler) are not missed here: the encoder that the delta is attached to knows.
    """
    form = head_form(anatomy.family, anatomy.prefix, task, anatomy.hidden, options)
    known = {name: shape for dense in form for name, shape in _head_tensors(dense).items()}
    needed = {f"{dense.path}.weight" for dense in form if dense.base_name is None}
    lacking = [name for name in known if name in needed and name not in head]
    if lacking:
        raise FormatError(f"the head lacks {', '.join(lacking)}; a head must be saved with all that the base lacks")
    wanted = {name: shape for name, shape in known.items() if name in head}
    check_shapes(head, wanted, f"the head of {anatomy.family} for {task.kind}")


def check_fits(delta: Delta, made_for: Anatomy, anatomy: Anatomy) -> None:
    """Raises BaseMismatch unless an encoder has the dimensions of the one that the delta was made for."""
    for field in ("family", "layers", "hidden", "heads", "embedding_width"):
        ours, theirs = getattr(anatomy, field), getattr(made_for, field)
        if ours != theirs:
            raise BaseMismatch(
                f"delta {delta.name!r} was made for {delta.base.name} with {field} {theirs}; this encoder has {ours}"
            )
    try:
        fits = expected_shapes(delta.specs, anatomy) == shapes_of(delta.tensors)
    except FormatError:
        fits = False
    if not fits:
        raise BaseMismatch(f"delta {delta.name!r} was made for {delta.base.name}, whose projections have other shapes")


def check_base(delta: Delta, ref: BaseRef) -> None:
    """Raises BaseMismatch, naming both, unless the delta was made for exactly these weights."""
    if delta.base.sha256 != ref.sha256:
        raise BaseMismatch(
            f"delta {delta.name!r} was made for {delta.base.name} (weights {delta.base.sha256[:12] or 'unknown'}), "
            f"but the encoder is {ref.name} (weights {ref.sha256[:12]}); "
            f"give the encoder that it was made for, or train it again on this one"
        )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises FormatError for NaN and infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FormatError(f"the tensor {name[:120]!r} holds NaN or infinity; train the delta again")


def _head_tensors(dense: Dense) -> dict[str, tuple[int, ...]]:
    """Names and shapes that one layer of a head may have."""
    found: dict[str, tuple[int, ...]] = {
        f"{dense.path}.weight": (dense.outputs, dense.inputs),
        f"{dense.path}.bias": (dense.outputs,),
    }
    if dense.norm:
        found |= {f"{dense.norm}.weight": (dense.outputs,), f"{dense.norm}.bias": (dense.outputs,)}
    return found
