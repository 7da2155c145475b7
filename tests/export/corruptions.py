"""Ways to spoil a delta's directory, its metadata and stacks, a checkpoint and its tokenizer: name -> what is done.

Each takes the directories of the delta and of its base and leaves something that must not be exported.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Spoil = Callable[[Path, Path], None]
TENSORS, MANIFEST = "adapter_model.safetensors", "delta.json"


def corruptions() -> dict[str, Spoil]:
    """All of them, by what they are called in tests."""
    return dict((*_files(), *_manifests(), *_stacks(), *_checkpoints(), *_tokenizers()))


def _files() -> Iterator[tuple[str, Spoil]]:
    """Files of the delta and of its base that are missing, cut short, something else, or none at all."""
    of_base = ("config.json", "model.safetensors", "tokenizer.json")
    for which, name in ((0, MANIFEST), (0, TENSORS), *((1, name) for name in of_base)):
        for what, change in FILES.items():
            yield f"{name} {what}", partial(_at, which, name, change)


def _at(which: int, name: str, change: Callable[[Path], None], delta: Path, base: Path) -> None:
    change((delta, base)[which] / name)


def _cut(share: float, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b"") and None,
    "a folder": _folder,
    "cut to a tenth": partial(_cut, 0.1),
    "cut to half": partial(_cut, 0.5),
    "cut by a little": partial(_cut, 0.99),
    "zeros": lambda path: path.write_bytes(bytes(len(path.read_bytes()))) and None,
    "another format": lambda path: path.write_bytes(b"PK\x03\x04" + b"\x80" * 200) and None,
    "a list": lambda path: path.write_text("[1, 2]") and None,
    "an empty object": lambda path: path.write_text("{}") and None,
}


def _manifests() -> Iterator[tuple[str, Spoil]]:
    """Values of the manifest that are of another type, out of range, or gone."""
    for path, values in FIELDS.items():
        for value in values:
            yield f"{path} is {json.dumps(value)}", partial(_field, path, value)
        if path in NEEDED:
            yield f"{path} is gone", partial(_field, path, None, gone=True)


FIELDS: dict[str, tuple[Any, ...]] = {
    "format": (0, 99, "1", None),
    "name": ("", "a/b", "..", 3, "x" * 300),
    "base": ({}, "bert", None),
    "base.sha256": ("", 7, "0" * 64),
    "base.family": ("roberta", 1),
    "task": ({}, [], "classification"),
    "task.kind": ("dancing", "", None, ["classification"]),
    "task.labels": ([], ["bad"], ["bad", "bad", "none"], "bad", [1, 2, 3]),
    "task.max_length": (0, -1, 10**9, "48", 1.5),
    "task.pooling": ("sum", None, 3),
    "task.head": ("none", "two", 5),
    "kinds": ({}, {"magic": {}}, [], None),
    "kinds.lora.rank": (0, -2, 3, "2", 10**12),
    "kinds.lora.targets": ([], ["nothing"], "query", ["query"]),
    "kinds.lora.alpha": ("large", None, []),
    "kinds.bitfit.biases": ("some", 1),
    "kinds.adapter.width": (0, 4, "3"),
    "kinds.adapter.preset": ("tiny", None),
    "kinds.adapter.activation": ("explode", 2),
    "kinds.prompt.length": (0, 3, -1, "2"),
    "kinds.prompt.placement": ("inside", None),
    "kinds.prefix.length": (0, 5, "2"),
    "tensors": ({}, [], None),
    "head": ({}, [], None),
    "files": ({}, [], None),
    "anatomy": ([], "bert"),
}


NEEDED = ("format", "name", "base", "base.sha256", "task", "task.kind", "kinds", "tensors", "head", "files", "anatomy")


def _field(path: str, value: Any, delta: Path, base: Path, gone: bool = False) -> None:
    manifest = json.loads((delta / MANIFEST).read_text())
    *way, last = path.split(".")
    place = manifest
    for step in way:
        place = place[step]
    if gone:
        del place[last]
    else:
        place[last] = value
    (delta / MANIFEST).write_text(json.dumps(manifest))


def _stacks() -> Iterator[tuple[str, Spoil]]:
    """Tensors that do not fit, with a manifest that vouches for their file."""
    for kind, name in STACKS.items():
        for what, change in CHANGES.items():
            yield f"{kind} {what}", partial(_stack, name, change)
    yield "one tensor too many", partial(_stack, "bertology.more", lambda _: torch.zeros(3))


STACKS = {
    "lora": "base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight",
    "bitfit": "bertology.bitfit.key",
    "adapter": "bertology.adapter.output.down",
    "prompt": "bertology.prompt.vectors",
    "prefix": "bertology.prefix.keys",
    "head": "base_model.model.classifier.weight",
}
CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "gone": lambda tensor: None,
    "with a row too many": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "with a row too few": lambda tensor: tensor[1:],
    "with a column too few": lambda tensor: tensor[..., 1:],
    "flattened": lambda tensor: tensor.flatten(),
    "whole numbers": lambda tensor: tensor.to(torch.int32),
    "not a number": lambda tensor: tensor * float("nan"),
    "infinite": lambda tensor: tensor + float("inf"),
}


def _stack(name: str, change: Callable[[torch.Tensor], torch.Tensor | None], delta: Path, base: Path) -> None:
    path = delta / TENSORS
    tensors = load_file(path)
    changed = change(tensors.pop(name, torch.zeros(1)))
    save_file(tensors if changed is None else {**tensors, name: changed.contiguous()}, path, {"format": "pt"})
    manifest, data = json.loads((delta / MANIFEST).read_text()), path.read_bytes()
    manifest["files"][TENSORS] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (delta / MANIFEST).write_text(json.dumps(manifest))


def _checkpoints() -> Iterator[tuple[str, Spoil]]:
    """Configurations and weights of the base that are not those of the delta's, or of any model."""
    for key, values in CONFIGS.items():
        for value in values:
            yield f"the base's {key} is {json.dumps(value)}", partial(_json, "config.json", key, value)
    yield "the base's weights lack one", partial(_weights, lambda tensors: tensors.pop(WEIGHT))
    yield "the base's weights are others", partial(_weights, lambda tensors: tensors[WEIGHT].add_(1.0))
    yield "the base's weights are not numbers", partial(_weights, lambda tensors: tensors[WEIGHT].fill_(float("nan")))
    yield "the base's weights do not fit", partial(_weights, _shortened)


CONFIGS: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2", "dancer", "", 3, None),
    "hidden_size": (0, -32, 30, 64, "wide", None),
    "num_attention_heads": (0, 5, 8, "four"),
    "num_hidden_layers": (0, 2, 4, -1, "three"),
    "intermediate_size": (0, 47, "x"),
    "vocab_size": (0, 3, -1, "all"),
    "max_position_embeddings": (0, 12, "long"),
    "hidden_act": ("explode", 3),
    "is_decoder": (True,),
}
WEIGHT = "encoder.layer.0.attention.self.query.weight"


def _shortened(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WEIGHT] = tensors[WEIGHT][1:].contiguous()


def _weights(change: Callable[[dict[str, torch.Tensor]], Any], delta: Path, base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def _json(name: str, key: str, value: Any, delta: Path, base: Path) -> None:
    *way, last = key.split(".")
    values = place = json.loads((base / name).read_text())
    for step in way:
        place = place[step]
    place[last] = value
    (base / name).write_text(json.dumps(values))


def _tokenizers() -> Iterator[tuple[str, Spoil]]:
    """Tokenizers that cannot be read, or whose ids the model does not have."""
    for key, values in TOKENIZERS.items():
        for value in values:
            yield f"the tokenizer's {key} is {json.dumps(value)[:20]}", partial(_json, "tokenizer.json", key, value)
    yield "no tokenizer at all", _no_tokenizer


TOKENIZERS: dict[str, tuple[Any, ...]] = {
    "version": (9, None),
    "model": ({}, None, "WordPiece", {"type": "Dance"}),
    "model.vocab": ({}, [], {"a": -1}, {"a": "b"}, {"a": 0, "[UNK]": 10**6}),
    "model.unk_token": ("missing", 3),
    "added_tokens": ([{"id": 1}], "none"),
    "normalizer": ({"type": "Shout"},),
    "pre_tokenizer": ({"type": "Tear"}, 5),
    "post_processor": ({"type": "TemplateProcessing"}, {"type": "Stamp"}),
}


def _no_tokenizer(delta: Path, base: Path) -> None:
    for path in base.glob("tokenizer*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
