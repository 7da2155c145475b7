"""Names on disk: the files of a delta directory, and what a delta or a version may be called."""

from __future__ import annotations

import re

from bertology_serve.errors import FormatError

MANIFEST = "delta.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FULL_WEIGHTS = "model.safetensors"
CARD = "README.md"
PICKLES = ("adapter_model.bin", "pytorch_model.bin", "pytorch_adapter.bin")
FILES = (ADAPTER_WEIGHTS, FULL_WEIGHTS, CARD, MANIFEST, ADAPTER_CONFIG)

OWN_PREFIX = "bertology."  # what tensors begin with that peft has no name for
RESERVED = ("base",)  # the encoder itself answers under this name
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_name(word: object, what: str) -> str:
    """``word`` if it can be the name of a delta or version; raises FormatError."""
    if not isinstance(word, str) or not _NAME.fullmatch(word):
        raise FormatError(
            f"{what} {str(word)[:80]!r} cannot be used; expected 1 to 64 of a-z 0-9 . _ -, beginning with a-z or 0-9"
        )
    if word in RESERVED:
        raise FormatError(f"{what} {word!r} is taken by the encoder itself; choose another name")
    return word
