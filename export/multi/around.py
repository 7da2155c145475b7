"""What stands beside the graph for many deltas: its metadata, the card, and the lines that run it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import bertology_serve
from bertology_serve.deltas.delta import Delta
from bertology_serve.export.metadata import SEMANTICS, base_name
from bertology_serve.export.multi.library import FILE, Library
from bertology_serve.export.parts import Parts
from bertology_serve.export.spec import ExportSpec
from bertology_serve.export.verify import Report

OUTPUTS = (
    "logits [batch, labels], token_logits [batch, sequence, labels], embedding [batch, hidden]: float32, before any "
    "softmax; a sequence's answer is in the output and the first columns that its delta's card names, zero elsewhere"
)


def facts_of(base: Delta, parts: Parts, spec: ExportSpec, name: str, longest: int) -> dict[str, str]:
    """Facts by name for the file's metadata. They name no delta: those may come later."""
    facts: dict[str, Any] = {
        "name": name,
        "task": "many",
        "deltas": f"{FILE}: all other inputs, safetensors; its metadata holds a card for each row of the tables",
        "max_length": longest,
        "base_name": base_name(base),
        "base_sha256": base.base.sha256,
        "base_family": base.base.family,
        "inputs": f"{', '.join(parts.inputs)}: {SEMANTICS}; delta: int64 [batch], the number of each row's delta",
        "outputs": OUTPUTS,
        "precision": spec.precision,
        "opset": spec.operators,
        "back_end": "direct",
        "unpadded": True,
        "tool": f"bertology-serve {bertology_serve.__version__}",
    }
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in facts.items()
    }


def example(model: str, facts: Mapping[str, str], library: Library, directory: str) -> str:
    """Lines of Python that run the file for two deltas at once, with nothing of this package."""
    inputs = facts["inputs"].split(":")[0].split(", ")
    last = len(library.cards) - 1
    return (
        f"import numpy, onnxruntime, safetensors.numpy, transformers\n"
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({directory!r})\n"
        f"stacks = safetensors.numpy.load_file({directory + '/' + FILE!r})\n"
        f"session = onnxruntime.InferenceSession({directory + '/' + model!r}, providers=['CPUExecutionProvider'])\n"
        f"texts = tokenizer(['A text.', 'Another one.'], padding=True, truncation=True, return_tensors='np')\n"
        f"rows = {{name: texts[name] for name in {inputs!r}}} | {{'delta': numpy.array([{last}, 0])}}\n"
        f"print(session.run([{library.cards[last].output!r}], rows | stacks)[0])"
    )


def card(model: str, facts: Mapping[str, str], library: Library, report: Report) -> str:
    """The model card."""
    deltas = "".join(
        f"| {number} | {one.name} | {one.version} | {one.task} | {one.output}[..., :{one.columns}] "
        f"| {', '.join(one.labels)} | {', '.join(one.kinds)} |\n"
        for number, one in enumerate(library.cards)
    )
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    return (
        f"# {facts['name']}\n\n`{model}` is {facts['base_name']} with inputs for many deltas, exported by "
        f"{facts['tool']}.\n\n{report.line()}.\n\n```python\n{example(model, facts, library, '.')}\n```\n\n"
        f"| number | delta | version | task | output | labels | kinds |\n|---|---|---|---|---|---|---|\n{deltas}\n"
        f"| | |\n|---|---|\n{rows}"
    )
