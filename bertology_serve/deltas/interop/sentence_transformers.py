"""What sentence-transformers writes beside weights: how the rows are pooled, and whether vectors have length 1.

``modules.json`` lists what a text goes through: Transformer, Pooling (``1_Pooling/config.json``), and Normalize or not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from bertology_serve.deltas.safe_io import Limits, parse_json, read_bytes
from bertology_serve.errors import FormatError, Unsupported
from bertology_serve.files import JsonObject
from bertology_serve.tasks.spec import EMBEDDING, POOLINGS, TaskSpec

MODULES, POOLING = "modules.json", "1_Pooling"
SETTINGS = "config_sentence_transformers.json"
# How its versions before 5 wrote ``pooling_mode``.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


Read = Callable[[str], bytes | None]
"""The bytes of a file, by its path in a directory; ``None`` where there is none."""


def reader(directory: Path, limits: Limits, root: Path) -> Read:
    """That of a delta's directory, whose files lie under ``root``."""

    def read(name: str) -> bytes | None:
        path = directory / name
        return read_bytes(path, limits.json_bytes, root) if os.path.lexists(path) else None

    return read


def embedding_task(read: Read, directory: str | Path, longest: int) -> TaskSpec:
    """The task of sentence embeddings of at most ``longest`` tokens, as a directory (or hub id) has it.

    One that says nothing of it is mean-pooled and normalised. Raises FormatError for malformed files, Unsupported for
    another pooling, further modules, or prompts whose tokens are not pooled.
    """
    where = str(directory)
    tokenizer, own = (_object(read, name, where) for name in ("tokenizer_config.json", _SENTENCE))
    for most in (tokenizer.get("model_max_length"), own.get("max_seq_length")):
        if isinstance(most, int | float) and most >= 3:
            longest = min(longest, int(most))
    if own.get("do_lower_case"):
        raise Unsupported(f"{where}/{_SENTENCE}: do_lower_case is not read here; give the tokenizer that lowers")
    prompts = _prompts(_object(read, SETTINGS, where), f"{where}/{SETTINGS}")
    names, place = _modules(read, where)
    told = _object(read, f"{place}/config.json", where)
    normalize = not told or Path(where, "2_Normalize").is_dir() if names is None else "Normalize" in names
    pooling = _pooling(told, f"{where}/{place}/config.json", any(dict(prompts).values()))
    return TaskSpec(
        EMBEDDING, max_length=longest, pooling=pooling, head="none", normalize=normalize, prompts=prompts
    )  # fmt: skip


def _prompts(settings: JsonObject, where: str) -> tuple[tuple[str, str], ...]:
    """``TaskSpec.prompts`` from ``config_sentence_transformers.json``: its ``prompts``, empty ones too (nothing is read
    before such texts), and that of its ``default_prompt_name`` under the empty name. Raises FormatError for no texts.
    """
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise FormatError(f"{where}: 'prompts' holds no texts by name; expected what sentence-transformers writes")
    default = prompts.get(settings.get("default_prompt_name"))
    return (*prompts.items(), *([("", default)] if default else []))


_SENTENCE = "sentence_bert_config.json"


def _modules(read: Read, where: str) -> tuple[list[str] | None, str]:
    """The modules' names, ``None`` where none are listed, and the folder of the pooling."""
    found = read(MODULES)
    if found is None:
        return None, POOLING
    listed = parse_json(b'{"modules": %b}' % found, f"{where}/{MODULES}")["modules"]
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise FormatError(f"{where}/{MODULES} holds no list of modules; expected what sentence-transformers writes")
    names = [str(module.get("type")).rpartition(".")[2] for module in listed]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise Unsupported(
            f"{where}/{MODULES} lists {', '.join(names)[:120] or 'nothing'}; read here are Transformer, Pooling and "
            "Normalize, in this order"
        )
    place = str(listed[1].get("path"))
    if Path(place).name != place or place in ("", "..") or read(f"{place}/config.json") is None:
        raise Unsupported(f"{where}/{MODULES} names the folder {place[:80]!r}; expected one with config.json in it")
    return names, place


def _pooling(config: JsonObject, where: str, prompted: bool) -> str:
    """``prompted``: texts may have prompts."""
    if prompted and config.get("include_prompt") is False:
        raise Unsupported(f"{where}: include_prompt is false; here a prompt's tokens are pooled too")
    named = config.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if config.get(flag)] or ["mean"]
    modes = [named] if isinstance(named, str) else list(named)  # several are concatenated
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise Unsupported(
            f"{where}: pooling by {' and '.join(map(str, modes))[:80]} is not computed here; "
            f"known: {', '.join(POOLINGS)}"
        )
    return str(modes[0])


def _object(read: Read, name: str, where: str) -> JsonObject:
    """A JSON file; empty where there is none."""
    found = read(name)
    return {} if found is None else parse_json(found, f"{where}/{name}")
