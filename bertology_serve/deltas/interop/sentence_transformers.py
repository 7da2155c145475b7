"""What sentence-transformers writes beside a peft adapter: how the rows are pooled, and whether vectors have length 1.

``modules.json`` lists what a text goes through: Transformer, Pooling (``1_Pooling/config.json``), and Normalize or not.
"""

from __future__ import annotations

import os
from pathlib import Path

from bertology_serve.deltas.safe_io import Limits, parse_json, read_bytes, read_json
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


def embedding_task(directory: Path, longest: int, limits: Limits, root: Path) -> TaskSpec:
    """The task of an adapter of sentence embeddings, of at most ``longest`` tokens.

    A directory that says nothing of it is mean-pooled and normalised. Raises FormatError for malformed files,
    Unsupported for another pooling, further modules, or prompts whose tokens are not pooled.
    """
    tokenizer, own = (_optional(directory / name, limits, root) for name in ("tokenizer_config.json", _SENTENCE))
    for told in (tokenizer.get("model_max_length"), own.get("max_seq_length")):
        if isinstance(told, int | float) and told >= 3:
            longest = min(longest, int(told))
    if own.get("do_lower_case"):
        raise Unsupported(f"{directory / _SENTENCE}: do_lower_case is not read here; give the tokenizer that lowers")
    prompts = prompts_of(_optional(directory / SETTINGS, limits, root), str(directory / SETTINGS))
    pooling, normalize = _modules(directory, limits, root, bool(prompts))
    return TaskSpec(
        EMBEDDING, max_length=longest, pooling=pooling, head="none", normalize=normalize, prompts=prompts
    )  # fmt: skip


def prompts_of(settings: JsonObject, where: str) -> tuple[tuple[str, str], ...]:
    """``TaskSpec.prompts`` from ``config_sentence_transformers.json``: its ``prompts`` that are not empty, its
    ``default_prompt_name`` under the empty name. Raises FormatError for what is no text.
    """
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise FormatError(f"{where}: 'prompts' holds no texts by name; expected what sentence-transformers writes")
    default = prompts.get(settings.get("default_prompt_name"))
    return tuple((name, text) for name, text in {**prompts, "": default}.items() if text)


_SENTENCE = "sentence_bert_config.json"


def _modules(directory: Path, limits: Limits, root: Path, prompted: bool) -> tuple[str, bool]:
    """The pooling, and whether vectors are normalised; ``prompted``: texts may have prompts."""
    if not os.path.lexists(directory / MODULES):
        pooled = os.path.lexists(directory / POOLING / "config.json")
        if not pooled:
            return "mean", True
        return _pooling(directory / POOLING, limits, root, prompted), (directory / "2_Normalize").is_dir()
    where = str(directory / MODULES)
    listed = parse_json(b'{"modules": %b}' % read_bytes(directory / MODULES, limits.json_bytes, root), where)["modules"]
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise FormatError(f"{where} holds no list of modules; expected what sentence-transformers writes")
    names = [str(module.get("type")).rpartition(".")[2] for module in listed]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise Unsupported(
            f"{where} lists {', '.join(names)[:120] or 'nothing'}; read here are Transformer, Pooling and Normalize, "
            "in this order"
        )
    return _pooling(directory / str(listed[1].get("path")), limits, root, prompted), "Normalize" in names


def _pooling(place: Path, limits: Limits, root: Path, prompted: bool) -> str:
    config, _ = read_json(place / "config.json", limits, root)
    if prompted and config.get("include_prompt") is False:
        raise Unsupported(f"{place / 'config.json'}: include_prompt is false; here a prompt's tokens are pooled too")
    modes = pooling_modes(config) or ["mean"]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise Unsupported(
            f"{place / 'config.json'}: pooling by {' and '.join(map(str, modes))[:80]} is not computed here; "
            f"known: {', '.join(POOLINGS)}"
        )
    return str(modes[0])


def pooling_modes(config: JsonObject) -> list[str]:
    """The poolings that ``1_Pooling/config.json`` names; several are concatenated."""
    modes = config.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if config.get(flag)]
    return [modes] if isinstance(modes, str) else list(modes)


def _optional(path: Path, limits: Limits, root: Path) -> JsonObject:
    return read_json(path, limits, root)[0] if os.path.lexists(path) else {}
