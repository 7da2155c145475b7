"""What the package in ``web/`` refuses: requests that are wrong, what only the server does, and files that lie."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from tests.web.conftest import Ask

REQUESTS: dict[str, dict[str, Any]] = {
    "NotFound: there is no delta 'mood'; expected one of base, lora, folds, pfeiffer, pairs, words, prompted": {
        "delta": "mood"
    },
    "DataError: requests[1] for folds: field 'text' is undefined; expected a text that is not empty": {
        "delta": "folds"
    },
    "DataError: requests[1] for folds: field 'text' is \" \"; expected a text that is not empty": {
        "delta": "folds", "text": " "
    },
    "DataError: requests[1] for folds: fields 'text' and 'text_a' mean the same; give one of them": {
        "delta": "folds", "text": "a", "text_a": "b"
    },
    "DataError: requests[1] for pairs: field 'text_pair' is missing; this delta was trained on pairs of texts": {
        "delta": "pairs", "text": "a"
    },
    "DataError: requests[1] for lora: field 'top_k' is 21; expected an integer from 1 to 20": {
        "delta": "lora", "question": "a", "context": "b", "top_k": 21
    },
    "DataError: requests[1] for pfeiffer: field 'offsets' is \"bytes\"; expected one of characters, utf16": {
        "delta": "pfeiffer", "text": "a", "offsets": "bytes"
    },
    "DataError: requests[1] for words: field 'labels' has a label twice; expected each once": {
        "delta": "words", "text": "a", "labels": ["a", "a"]
    },
    "DataError: requests[1] for prompted: there is no prompt \"passage\"; this delta has query, ": {
        "delta": "prompted", "text": "a", "prompt_name": "passage"
    },
    "Unsupported: requests[1] for pfeiffer: field 'redact' is answered by the server alone; leave it out": {
        "delta": "pfeiffer", "text": "a", "redact": True
    },
    "Unsupported: requests[1] for lora: the context holds a special token such as [SEP]; take it out, or ask the server"
    : {"delta": "lora", "question": "a", "context": "b [SEP] c"},
}  # fmt: skip


def test_requests_are_refused_by_name_and_the_others_go_on(ask: Ask, export: Path):
    fine = {"delta": "base", "text": "the cat"}
    *refused, [[answer], _] = ask(export, *([fine, one] for one in REQUESTS.values()), [fine])
    assert [told for told, _ in refused] == [*REQUESTS]
    assert answer["task"] == "embedding"


def test_a_delta_is_read_when_it_is_asked_and_once(ask: Ask, export: Path):
    request = {"delta": "folds", "text": "the cat"}
    [_, none], [_, first], [_, second] = ask(export, [], [request], [request])
    assert none == ["manifest.json", "tokenizer.json", "tokenizer_config.json", "onnx/model.onnx"]
    assert first == second == [*none, "deltas/folds.safetensors", "onnx/head.safetensors"]


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def changed(out: Path) -> None:
        values = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        change(values)
        (out / "manifest.json").write_text(json.dumps(values), encoding="utf-8")

    return changed


LORA = "deltas/lora.safetensors"


def content(change: Callable[[bytes], bytes], path: str = LORA) -> Callable[[Path], None]:
    """Changes a file, and what the manifest says of it."""

    def changed(out: Path) -> None:
        made = change((out / path).read_bytes())
        (out / path).write_bytes(made)
        told = {"bytes": len(made), "sha256": hashlib.sha256(made).hexdigest()}
        manifest(lambda values: values["files"].update({path: told}))(out)

    return changed


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """Changes those of ``lora``."""

    def changed(before: bytes) -> bytes:
        arrays = load(before)
        change(arrays)
        return save(arrays)

    return content(changed)


TOLD = {"bytes": 1, "sha256": "0" * 64}
LIES: dict[str, Callable[[Path], None]] = {
    "manifest.json has format 2; expected bertology-serve-web/1": manifest(lambda it: it.update(format="2")),
    "manifest.json.deltas is null; expected a list": manifest(lambda it: it.update(deltas=None)),
    "manifest.json.deltas[1].task.labels[0] is 3; expected a text": manifest(
        lambda it: it["deltas"][1]["task"].update(labels=[3])
    ),
    "manifest.json: lora reads https://elsewhere/x, of which it says nothing": manifest(
        lambda it: it["deltas"][1].update(files=["https://elsewhere/x"])
    ),
    'the path "../secret" is none within the export': manifest(
        lambda it: (it["files"].update({"../secret": TOLD}), it["deltas"][1].update(files=["../secret"]))
    ),
    'the path "//elsewhere/x" is none within the export': manifest(
        lambda it: (it["files"].update({"//elsewhere/x": TOLD}), it["deltas"][1].update(files=["//elsewhere/x"]))
    ),
    "bytes, the manifest says 1; copy it anew": manifest(lambda it: it["files"][LORA].update(bytes=1)),
    "deltas/lora.safetensors has other bytes than the manifest says": manifest(
        lambda it: it["files"][LORA].update(sha256="0" * 64)
    ),
    "deltas/lora.safetensors ends within its header": content(lambda it: (1 << 40).to_bytes(8, "little") + it[8:]),
    "which cannot be; copy it anew": content(lambda it: it.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1)),
    "dtype is \"F16\"; expected one of F32, I64": tensors(
        lambda it: it.update({"key.a": it["key.a"].astype(np.float16)})
    ),
    "delta lora: key.a is int64 [1,1], the graph has float32 [3,key.height,32]": tensors(
        lambda it: it.update({"key.a": np.zeros((1, 1), np.int64)})
    ),
    "delta lora: key.b has 2 rows, its neighbours 4": tensors(
        lambda it: it.update({"key.b": it["key.b"][:, :2].copy()})
    ),
    "delta lora: key.ranks names row 9 of key, which it lacks": tensors(lambda it: it["key.ranks"].fill(9)),
    "delta lora: input_ids is int64 [1,1], the graph has none": tensors(
        lambda it: it.update(input_ids=np.zeros((1, 1), np.int64))
    ),
    "delta lora has a head of 2 columns, the manifest says 3": manifest(lambda it: it["deltas"][1].update(columns=3)),
    "tokenizer.json is no JSON": content(lambda it: b"{", "tokenizer.json"),
    "ONNX Runtime cannot load the graph": content(lambda it: b"0", "onnx/model.onnx"),
}  # fmt: skip


def test_files_that_lie(ask: Ask, export: Path, tmp_path: Path):
    """Nothing outside of the folder is asked for."""
    for number, lie in enumerate(LIES.values()):
        lie(Path(shutil.copytree(export, tmp_path / str(number))))
    request = {"delta": "lora", "question": "who ?", "context": "the cat"}
    exports = [tmp_path / str(number) for number in range(len(LIES))]
    for told, folder, [[found, files]] in zip(LIES, exports, ask.each(exports, [request]), strict=True):
        assert str(found).startswith("FormatError: "), (told, found)
        assert told in found
        assert all((folder / file).is_file() for file in files), files
