"""The model card of a delta: ``README.md``, in the form that the HuggingFace hub shows."""

from __future__ import annotations

import json
from collections.abc import Mapping

from bertology_serve.deltas.delta import Delta
from bertology_serve.files import JsonObject
from bertology_serve.tasks.spec import (
    CLASSIFICATION,
    EMBEDDING,
    MULTI_LABEL,
    MULTIPLE_CHOICE,
    QUESTION_ANSWERING,
    REGRESSION,
    TOKEN_CLASSIFICATION,
)

_PIPELINE_TAGS = {
    CLASSIFICATION: "text-classification",
    MULTI_LABEL: "text-classification",
    REGRESSION: "text-classification",
    TOKEN_CLASSIFICATION: "token-classification",
    QUESTION_ANSWERING: "question-answering",
    MULTIPLE_CHOICE: "multiple-choice",
    EMBEDDING: "sentence-similarity",
}
_LABELS_SHOWN = 20


def model_card(delta: Delta, obstacle: str) -> str:
    """Markdown with YAML front matter. ``obstacle`` says why peft does not load the delta; empty where it does."""
    parts = [_front_matter(delta, obstacle), f"# {delta.name}", _claim(delta), _table(_facts(delta))]
    if delta.metrics:
        rows = {_code(name): f"{value:.4g}" for name, value in delta.metrics.items()}
        parts += ["## Metrics", _table(rows)]
    parts += ["## Use", _use(delta, obstacle)]
    if delta.provenance:
        text = json.dumps(dict(delta.provenance), indent=1, ensure_ascii=False).replace("```", "` ` `")
        parts += ["## Provenance", f"```json\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def _front_matter(delta: Delta, obstacle: str) -> str:
    values: JsonObject = {
        "library_name": "bertology-serve" if obstacle else "peft",
        "base_model": delta.base.name,
        "pipeline_tag": _PIPELINE_TAGS[delta.task.kind],
        "tags": ["bertology-serve", *delta.kinds],
    }
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in values.items()), "---"])


def _claim(delta: Delta) -> str:
    return f"A {' + '.join(delta.kinds)} delta of {_code(delta.base.name)} for {delta.task.kind}."


def _facts(delta: Delta) -> dict[str, str]:
    task, labels = delta.task, [_code(label) for label in delta.task.labels[:_LABELS_SHOWN]]
    more = len(task.labels) - len(labels)
    groups = (delta.tensors, delta.head, delta.weights)
    counts = [sum(tensor.numel() for tensor in group.values()) for group in groups]
    facts = {
        "base model": f"{_code(delta.base.name)} ({delta.base.family}, weights {_code(delta.base.sha256[:12] or '?')})",
        "kinds": ", ".join(delta.kinds),
        "task": f"{task.kind}, at most {task.max_length} tokens, {task.pooling} pooling",
        "labels": ", ".join(labels) + (f" and {more} more" if more else ""),
        "parameters": f"{counts[0] + counts[2]:,} and {counts[1]:,} of the head",
        "size": f"{delta.bytes:,} bytes",
    }
    return {name: text for name, text in facts.items() if text}


def _use(delta: Delta, obstacle: str) -> str:
    lines = [
        "```",
        f"bertology-serve predict --backbone {_code(delta.base.name)[1:-1]} --deltas DIR --input FILE --output FILE",
        "```",
        "",
        f"The delta refuses every other base than the one with weights {_code(delta.base.sha256[:12] or '?')}.",
    ]
    peft = "It loads in peft too: `PeftModel.from_pretrained(task_model, DIR)`."
    return "\n".join([*lines, "", f"peft does not load it: {obstacle}." if obstacle else peft])


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


def _code(text: str) -> str:
    """Inline code that no text can break out of."""
    return "`" + " ".join(text.replace("`", "'").replace("|", "¦").split()) + "`"
