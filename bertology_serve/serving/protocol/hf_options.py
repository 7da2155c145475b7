"""The options of HuggingFace's task shape. What would not be honoured is refused, so that nothing is answered
differently without a word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bertology_serve.deltas.delta import Delta
from bertology_serve.errors import DataError, Unsupported
from bertology_serve.serving.protocol.bodies import shown
from bertology_serve.tasks.spec import (
    CLASSIFICATION,
    EMBEDDING,
    MULTIPLE_CHOICE,
    QUESTION_ANSWERING,
    REGRESSION,
    TOKEN_CLASSIFICATION,
)

TRANSFORMS = ("softmax", "sigmoid", "none")
GROUPED = ("simple", "first", "average", "max")
_KNOWN = {
    CLASSIFICATION: ("top_k", "function_to_apply"),
    REGRESSION: (),
    TOKEN_CLASSIFICATION: ("aggregation_strategy", "ignore_labels"),
    QUESTION_ANSWERING: ("top_k",),
    MULTIPLE_CHOICE: (),
    EMBEDDING: ("normalize", "dimensions", "truncate"),
}
# What counts as an option beside ``inputs`` too, where InferenceClient puts those of embeddings; other keys are ignored
_OPTIONS = frozenset(sum(_KNOWN.values(), ())) | {
    "stride", "align_to_words", "doc_stride", "handle_impossible_answer", "max_answer_len", "max_question_len",
    "max_seq_len", "prompt_name", "truncation_direction", "encoding_format", "candidate_labels", "hypothesis_template",
    "multi_label",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What a call asks for; ``None`` is the task's default.

    ``unit`` says that the delta's embeddings have unit length already, ``normalize`` that the answer's are to.
    """

    top_k: int | None = None
    transform: str = "softmax"
    ignore_labels: tuple[str, ...] = ()
    normalize: bool = False
    unit: bool = False
    dimensions: int | None = None

    @property
    def needs_logits(self) -> bool:
        """Whether the answer is made from logits."""
        return self.transform != "softmax"


def read_options(body: dict[str, Any], delta: Delta) -> Options:
    """The options of a body, under ``parameters`` or beside ``inputs``. Unsupported for those that the task lacks: a
    delta has decided them in its training, its labels too."""
    parameters = body.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise DataError(f"field 'parameters' is {shown(parameters)}; expected an object")
    beside = {name: value for name, value in body.items() if name in _OPTIONS}
    given = {name: value for name, value in (beside | (parameters or {})).items() if value is not None}
    kind = delta.task.kind
    for name in given:
        if name not in _KNOWN[kind]:
            known = f"; {kind} has {', '.join(_KNOWN[kind])}" if _KNOWN[kind] else ""
            raise Unsupported(f"option {name[:40]!r} is not supported for {kind}; leave it out{known}")
    unit = kind == EMBEDDING and delta.task.normalize
    options = Options(
        top_k=_integer(given, "top_k", 20 if kind == QUESTION_ANSWERING else 100_000),
        transform=_choice(given, "function_to_apply", TRANSFORMS, "softmax"),
        ignore_labels=_texts(given, "ignore_labels"),
        normalize=_flag(given, "normalize", unit),
        unit=unit,
        dimensions=_integer(given, "dimensions", 100_000),
    )
    _check(given, options, delta)
    return options


def _check(given: dict[str, Any], options: Options, delta: Delta) -> None:
    """Options that are known and yet cannot be honoured."""
    _choice(given, "aggregation_strategy", GROUPED, "simple")
    if options.unit and not options.normalize:
        raise Unsupported(f"delta {delta.name!r} gives normalised embeddings; leave 'normalize' out")
    if _flag(given, "truncate", True) is False:
        raise Unsupported("texts are always cut to the delta's maximum length; leave 'truncate' out")


def _integer(given: dict[str, Any], name: str, most: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise DataError(f"option {name!r} is out of range; expected an integer from 1 to {most}")
    return value


def _flag(given: dict[str, Any], name: str, default: bool = False) -> bool:
    value = given.get(name, default)
    if not isinstance(value, bool):
        raise DataError(f"option {name!r} is {shown(value)}; expected true or false")
    return value


def _choice(given: dict[str, Any], name: str, choices: tuple[str, ...], default: str) -> str:
    value = given.get(name, default)
    if value not in choices:
        raise DataError(f"option {name!r} is not supported with this value; expected one of {', '.join(choices)}")
    return str(value)


def _texts(given: dict[str, Any], name: str) -> tuple[str, ...]:
    value = given.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DataError(f"option {name!r} is {shown(value)}; expected a list of labels")
    return tuple(value)
