"""Physically smaller encoders: heads and FFN neurons cut out of the weights, on disk and in memory.

A pruned encoder is a directory like HuggingFace's (``config.json``, tokenizer, ``model.safetensors``) with
``pruning.json`` beside, which says what it was pruned from and what stayed. Layers may differ in size, which
HuggingFace's classes do not build: the parent's configuration builds the model, then its linears take the sizes that
their weights have. Attention modules take the number of heads from those and the head's width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bertology_serve.deltas.pruning import PRUNED, Numbers, Pruning, check_kept, pruning_of, sliced_state
from bertology_serve.deltas.store import write_tensors
from bertology_serve.errors import FormatError, Unsupported
from bertology_serve.families import compat
from bertology_serve.files import write_json
from bertology_serve.kinds.slots import GATE, QKV

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.families.compat import HiddenModel

RECORD, WEIGHTS = "pruning.json", "model.safetensors"


def obstacle(encoder: Encoder) -> str | None:
    """Why an encoder cannot be pruned, or ``None`` where it can."""
    family, slots = encoder.anatomy.family, encoder.anatomy.slots
    if QKV in slots or GATE in slots:
        return f"{family} packs projections into one matrix, whose parts would differ from layer to layer"
    if encoder.family.connect is not None or not encoder.packs:
        return f"the attention of {family} counts on the same heads in every layer"
    return None


def prune(encoder: Encoder, heads: Numbers, neurons: Numbers, directory: Path) -> None:
    """Writes the encoder with only these heads and neurons of each layer (numbers from 0, rising) to a directory.

    Weights are float32. Raises Unsupported for families that cannot be pruned, FormatError for heads or neurons that
    are not there, and for layers that would keep none.
    """
    reason = obstacle(encoder)
    if reason is not None:
        raise Unsupported(f"{encoder.name} cannot be pruned: {reason}; expected BERT, RoBERTa, DistilBERT or ELECTRA")
    pruning = Pruning(encoder.ref, encoder.anatomy, heads, neurons, encoder.pruning)
    check_kept(pruning, encoder.name)
    config = copy.deepcopy(encoder.config)
    compat.use_attention(config, encoder.model.dense_attention)
    setattr(config, PRUNED, True)
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    encoder.tokenizer.save_pretrained(directory)
    state = {name: tensor.cpu() for name, tensor in encoder.model.state_dict().items()}
    tensors = sliced_state(state, pruning) | encoder.base_head
    write_tensors(directory / WEIGHTS, {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()})
    write_json(directory / RECORD, pruning.as_dict())


def read_pruning(path: str) -> Pruning | None:
    """What a directory's encoder was pruned from; ``None`` for a whole one. Raises FormatError."""
    file = Path(path) / RECORD
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read {file}: {str(error)[:200]}; prune the encoder again") from None
    return pruning_of(values, str(file))


def pruned_model(path: str, config: PretrainedConfig) -> HiddenModel:
    """The headless model of a pruned encoder's directory; raises FormatError where its weights are not all there."""
    from transformers import AutoModel

    file = Path(path) / WEIGHTS
    with torch.random.fork_rng(devices=[]):
        model: HiddenModel = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)  # type: ignore[no-untyped-call]
    model.pooler = None
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"cannot read {file}: {str(error)[:200]}; prune the encoder again") from None
    shrink(model, state)
    try:
        model.load_state_dict({name: state[name] for name in model.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise FormatError(f"{file} does not fit its config.json: {str(error)[:200]}; prune it again") from None
    return model


def shrink(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives every linear the size that its weight has in a state dict; the values are still to be loaded."""
    for path, module in model.named_modules():
        weight = state.get(f"{path}.weight")
        if isinstance(module, nn.Linear) and weight is not None and weight.shape != module.weight.shape:
            module.out_features, module.in_features = weight.shape
            module.weight = nn.Parameter(module.weight.new_empty(weight.shape))
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.new_empty(weight.shape[0]))
