"""The models behind the alternatives: each answers texts of its tasks with a label and its score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from bertology_serve.bench.prove.stage import LENGTH
from bertology_serve.bench.serving.alternatives.bench_tasks import LABELS, Made
from bertology_serve.bench.serving.alternatives.collector import MOST, Answers
from bertology_serve.export.export_spec import Precision


class PeftMixed:
    """One encoder with all adapters in it; ``adapter_names`` gives each row its own."""

    mixed = True

    def __init__(self, made: Made) -> None:
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(made.base, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            made.base, num_labels=len(LABELS), trust_remote_code=False
        )
        first, *others = made.names
        self._model = PeftModel.from_pretrained(model, made.adapter(first), adapter_name=first)
        for name in others:
            self._model.load_adapter(made.adapter(name), adapter_name=name)
        self._model.eval()

    @torch.inference_mode()
    def __call__(self, tasks: Sequence[str], texts: Sequence[str]) -> Answers:
        """One padded batch of any tasks."""
        inputs = self._tokenizer(list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        return labelled(self._model(**inputs, adapter_names=list(tasks)).logits.numpy())


class Pipelines:
    """A merged model and transformers' pipeline for each task."""

    mixed = False

    def __init__(self, made: Made) -> None:
        from transformers import pipeline

        self._of = {
            name: pipeline("text-classification", model=str(made.checkpoint(name)), device="cpu") for name in made.names
        }

    def __call__(self, tasks: Sequence[str], texts: Sequence[str]) -> Answers:
        """One padded batch of one task."""
        found: Answers = self._of[tasks[0]](list(texts), batch_size=MOST, truncation=True, max_length=LENGTH)
        return found


class Sessions:
    """A merged ONNX model and its session for each task."""

    mixed = False

    def __init__(self, made: Made, precision: Precision = "fp32") -> None:
        import onnxruntime
        from transformers import AutoTokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._tokenizer = AutoTokenizer.from_pretrained(made.base, trust_remote_code=False)
        self._of = {
            name: onnxruntime.InferenceSession(
                str(made.onnx(name, precision)), options, providers=["CPUExecutionProvider"]
            )
            for name in made.names
        }

    def __call__(self, tasks: Sequence[str], texts: Sequence[str]) -> Answers:
        """One batch of one task."""
        session = self._of[tasks[0]]
        inputs = self._tokenizer(list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="np")
        given = {one.name: inputs[one.name].astype(np.int64) for one in session.get_inputs()}
        return labelled(session.run(None, given)[0])


def labelled(logits: np.ndarray[Any, Any]) -> Answers:
    """The best label of each row [n, labels] and its softmax."""
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    scores = odds / odds.sum(-1, keepdims=True)
    return [{"label": LABELS[row.argmax()], "score": float(row.max())} for row in scores]


MODELS: dict[str, Callable[[Made], Any]] = {
    "peft": PeftMixed,
    "pipelines": Pipelines,
    "sessions": Sessions,
    "sessions, 8 bits": partial(Sessions, precision="int8-row"),
}
