"""Exports of single deltas that answer again: read from their directories, run in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertology_serve.deltas.delta import BaseRef, Delta
from bertology_serve.encoder.loading import load_tokenizer
from bertology_serve.errors import BertologyError, FormatError, NotFound
from bertology_serve.export.export_spec import MODEL
from bertology_serve.export.metadata import TASK_OPTIONS
from bertology_serve.export.onnx_engine import buckets
from bertology_serve.export.samples import Case
from bertology_serve.export.session import Session
from bertology_serve.tasks.spec import Encoding, TaskSpec

FACTS = "bertology_serve"


class OnnxModel:
    """One export: ``delta`` says name, version, task and base, and holds no tensors."""

    def __init__(self, delta: Delta, session: Session, tokenizer: Any, hidden: int) -> None:
        self.delta, self.tokenizer, self._session, self._hidden = delta, tokenizer, session, hidden

    @classmethod
    def open(cls, directory: Path) -> OnnxModel:
        """Reads a directory in the layouts ``hf`` and ``flat``.

        Raises FormatError for what is no such export, VerificationError where ONNX Runtime cannot load the file,
        Unsupported without ONNX Runtime.
        """
        config, model = _config(directory), _file(directory)
        try:
            delta, hidden = _delta(config[FACTS]), int(config.get("hidden_size") or config["dim"])
        except (KeyError, TypeError, ValueError, BertologyError) as problem:
            raise FormatError(
                f"{directory} is no export of a single delta ({problem}); export one with --merge"
            ) from None
        return cls(delta, Session(model), load_tokenizer(str(directory)), hidden)

    def outputs(self, encodings: Sequence[Encoding]) -> list[Tensor]:
        """[C], for tasks that answer for every token [len, C], for embeddings [H], of unit length where exported so.

        Sequences of like length run together.
        """
        pad, found = self.tokenizer.pad_token_id or 0, dict[int, Tensor]()
        for group in buckets([len(one) for one in encodings], self._hidden):
            chosen = tuple(encodings[i] for i in group)
            rows = self._session.run(Case(chosen, max(map(len, chosen)), left=False).arrays(pad))
            for i, row in zip(group, torch.from_numpy(rows), strict=True):
                found[i] = row[: len(encodings[i])] if self.delta.task.per_token else row
        return [found[i] for i in range(len(encodings))]


def exports(root: Path, some: bool = True) -> list[Path]:
    """A directory that is an export itself, or else those in it; NotFound where there is none, unless ``some`` need not
    be.
    """
    below = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    found = [root] if _holds_model(root) else [path for path in below if _holds_model(path)]
    if some and not found:
        raise NotFound(f"no export in {root}; expected onnx/model.onnx or NAME/onnx/model.onnx below it")
    return found


_LAYOUTS = (MODEL["hf"], MODEL["flat"])


def _holds_model(directory: Path) -> bool:
    return any((directory / model).is_file() for model in _LAYOUTS)


def _file(directory: Path) -> Path:
    return next((directory / model for model in _LAYOUTS if (directory / model).is_file()), directory / _LAYOUTS[0])


def _config(directory: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise FormatError(f"{directory} is no export: config.json cannot be read ({problem})") from None
    if not isinstance(config, dict) or not isinstance(config.get(FACTS), dict):
        raise FormatError(f"{directory} was not exported by bertology-serve, which says of its task in config.json")
    return config


def _delta(facts: Mapping[str, str]) -> Delta:
    """What the metadata tell of the delta that was exported."""
    options = {"pairs": False, "thresholds": (), "abstain": 0.0, **json.loads(facts["task_options"])}  # older exports
    options["thresholds"] = tuple(options["thresholds"])
    task = TaskSpec(
        facts["task"],
        labels=tuple(json.loads(facts["labels"])),
        max_length=int(facts["max_length"]),
        pooling=facts["pooling"],
        **{name: options[name] for name in TASK_OPTIONS},
    )
    base = BaseRef(facts["base_name"], facts["base_sha256"], facts["base_family"])
    return Delta(facts["name"], base, task, version=facts["delta_version"] or facts["delta_sha256"][:12])
