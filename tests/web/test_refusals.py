"""What the package in ``web/`` refuses: requests that are wrong, what only the server does, and files that lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

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


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """Changes those of ``lora``, and what the manifest says of their size."""

    def changed(out: Path) -> None:
        path = out / "deltas/lora.safetensors"
        arrays = load_file(path)
        change(arrays)
        save_file(arrays, path)
        manifest(lambda values: values["files"].update({"deltas/lora.safetensors": path.stat().st_size}))(out)

    return changed


def header(out: Path) -> None:
    path = out / "deltas/lora.safetensors"
    content = bytearray(path.read_bytes())
    content[:8] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(content)


def offsets(out: Path) -> None:
    path = out / "deltas/lora.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1))


LIES: dict[str, Callable[[Path], None]] = {
    "manifest.json has format 2; expected bertology-serve-web/1": manifest(lambda it: it.update(format="2")),
    "manifest.json.deltas is null; expected a list": manifest(lambda it: it.update(deltas=None)),
    "manifest.json.deltas[1].task.labels[0] is 3; expected a text": manifest(
        lambda it: it["deltas"][1]["task"].update(labels=[3])
    ),
    "manifest.json: lora reads https://elsewhere/x, of which no size is known": manifest(
        lambda it: it["deltas"][1].update(files=["https://elsewhere/x"])
    ),
    'the path "../secret" is none within the export': manifest(
        lambda it: (it["files"].update({"../secret": 1}), it["deltas"][1].update(files=["../secret"]))
    ),
    'the path "//elsewhere/x" is none within the export': manifest(
        lambda it: (it["files"].update({"//elsewhere/x": 1}), it["deltas"][1].update(files=["//elsewhere/x"]))
    ),
    "bytes, the manifest says 1; copy the export anew": manifest(
        lambda it: it["files"].update({"deltas/lora.safetensors": 1})
    ),
    "deltas/lora.safetensors ends within its header": header,
    "which cannot be; copy it anew": offsets,
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
    "tokenizer.json is no JSON": lambda out: (out / "tokenizer.json").write_text("{") and None,
    "ONNX Runtime cannot load the graph": lambda out: (out / "onnx/model.onnx").write_bytes(
        bytes((out / "onnx/model.onnx").stat().st_size)
    )
    and None,
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
