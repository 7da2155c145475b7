"""Exports in other people's software, each in an environment of its own: ``make test-elsewhere`` makes them.

``BERTOLOGY_ELSEWHERE`` names the directory with ``optimum`` and ``openvino``, environments of Python, and
``node_modules``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.export import exporting
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import export_delta
from bertology_serve.export.onnx_engine import OnnxModel
from bertology_serve.export.session import Session
from bertology_serve.tasks.encoding import encode_text
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.export.cases import ANSWERS, CLASSES, FOLDS, TAGS

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent / "elsewhere"
ELSEWHERE = Path(os.environ.get("BERTOLOGY_ELSEWHERE", ROOT / ".elsewhere"))
TEXTS = ["the cat was very good", "a bad film ."]
QUESTION, CONTEXT = "where was the cat", "the cat went to Paris ."
TASKS = {
    "classes": CLASSES, "tags": TAGS, "answers": ANSWERS,
    **{name: TaskSpec("embedding", max_length=32, head="none", pooling=name, normalize=name != "mean")
       for name in ("cls", "mean", "max")},
}  # fmt: skip


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """A directory of exports, one a task; ``exports/../openvino`` are the same for OpenVINO, where it is installed."""
    root = tmp_path_factory.mktemp("elsewhere")
    encoder: Encoder = tiny.encoder("bert", root / "base")
    with pytest.MonkeyPatch.context() as patched:
        real = exporting.built_in
        patched.setattr(exporting, "built_in", lambda tokenizer, longest: list(real(tokenizer, longest))[::9])
        for name, task in TASKS.items():
            spec = ExportSpec(merge=True, target="cpu" if name != "answers" else "portable")
            delta = tiny.delta(encoder, name, FOLDS, task)
            export_delta(encoder, delta, root / "exports" / name, spec)
            if importlib.util.find_spec("openvino"):
                spec = ExportSpec(merge=True, target="openvino")
                export_delta(encoder, delta, root / "openvino" / name, spec)
    return root / "exports"


def python(name: str) -> str:
    path = ELSEWHERE / name / "bin" / "python"
    if not path.exists():
        pytest.skip(f"no environment {name} in {ELSEWHERE}: make test-elsewhere makes it")
    return str(path)


def there(directory: Path) -> Path:
    if not directory.exists():
        pytest.skip("openvino is not installed here, which writes such files")
    return directory


def run(*command: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, capture_output=True, text=True, env=clean | {"HF_HUB_OFFLINE": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-500:]
    return done.stdout


def said(*command: str) -> Any:
    """The JSON of the last line."""
    return json.loads(run(*command).strip().splitlines()[-1])


def answers(directory: Path, *texts: tuple[str, str | None]) -> list[np.ndarray]:
    """What this package answers from the same file."""
    model = OnnxModel.open(directory)
    return [out.numpy() for out in model.outputs([encode_text(model.tokenizer, *text, 32) for text in texts])]


def softmax(row: Any) -> torch.Tensor:
    return torch.tensor(row).double().softmax(-1)


@pytest.mark.parametrize("name", TASKS)
def test_optimum(name: str, exports: Path):
    assert "max |Δ| 0.0e+00" in run(
        python("optimum"), str(ROOT / "benchmarks/export_in_optimum.py"), str(exports / name)
    )


@pytest.mark.parametrize(("backend", "folder"), [("onnx", "exports"), ("openvino", "openvino")])
@pytest.mark.parametrize("name", ["cls", "mean", "max"])
def test_sentence_transformers(name: str, backend: str, folder: str, exports: Path):
    """Its backends pool the rows as the task does, and normalise as it does."""
    driver, directory = str(HERE / "in_sentence_transformers.py"), str(there(exports.parent / folder / name))
    found = said(python({"onnx": "optimum"}.get(backend, backend)), driver, directory, json.dumps(TEXTS), backend)
    found = found["sentence_embedding"]
    expected = answers(exports / name, *((text, None) for text in TEXTS))
    assert np.abs(np.array(found) - np.stack(expected)).max() <= 1e-5


@pytest.mark.parametrize("name", TASKS)
def test_optimum_intel(name: str, exports: Path):
    """What is exported for OpenVINO; pooling is left to its callers."""
    ids = np.array([[2, 5, 9, 11, 3], [2, 7, 3, 0, 0]])
    given = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64), "token_type_ids": np.zeros_like(ids)}
    rows = {key: value.tolist() for key, value in given.items()}
    directory = str(there(exports.parent / "openvino" / name))
    found = said(python("openvino"), str(HERE / "in_optimum_intel.py"), directory, json.dumps(rows))
    ours = Session(exports / name / "onnx" / "model.onnx").outputs(given)
    assert set(found) == set(ours) - {"sentence_embedding"}
    for output, expected in ((output, ours[output]) for output in found):
        assert np.abs(np.array(found[output]) - expected).max() <= 1e-4, output


def pipeline(exports: Path, name: str, task: str, *inputs: Any) -> Any:
    """What transformers.js answers."""
    node, modules = shutil.which("node"), ELSEWHERE / "node_modules"
    if node is None or not (modules / "@huggingface" / "transformers").is_dir():
        pytest.skip(f"no node, or no @huggingface/transformers in {modules}: make test-elsewhere installs it")
    return said(node, str(HERE / "in_transformers_js.mjs"), str(modules), str(exports / name), task, json.dumps(inputs))


def test_transformers_js_classifies(exports: Path):
    (found,) = pipeline(exports, "classes", "text-classification", TEXTS[0])
    scores = softmax(answers(exports / "classes", (TEXTS[0], None))[0])
    assert found["label"] == CLASSES.labels[int(scores.argmax())]
    assert found["score"] == pytest.approx(float(scores.max()), abs=1e-5)


def test_transformers_js_tags(exports: Path):
    found = pipeline(exports, "tags", "token-classification", TEXTS[0], {"ignore_labels": []})
    scores = softmax(answers(exports / "tags", (TEXTS[0], None))[0])[1:-1]  # without [CLS] and [SEP]
    assert [one["entity"] for one in found] == [TAGS.labels[i] for i in scores.argmax(-1).tolist()]
    assert [one["score"] for one in found] == pytest.approx(scores.amax(-1).tolist(), abs=1e-5)


def test_transformers_js_answers(exports: Path):
    """The best pair of a start and an end in the context."""
    found = pipeline(exports, "answers", "question-answering", QUESTION, CONTEXT)
    assert found["answer"]
    assert all(word in CONTEXT.lower() for word in found["answer"].lower().split())
    start, end = softmax(answers(exports / "answers", (QUESTION, CONTEXT))[0].T)
    assert 0 < found["score"] <= float(start.max() * end.max()) * 50  # it takes the softmax over the context alone


def test_transformers_js_embeds(exports: Path):
    found = pipeline(exports, "mean", "feature-extraction", TEXTS, {"pooling": "mean", "normalize": False})
    expected = answers(exports / "mean", *((text, None) for text in TEXTS))
    assert np.abs(np.array(found) - np.stack(expected)).max() <= 1e-5
