"""HuggingFace's task shape: ``{"inputs": ..., "parameters": {...}}`` for one delta. Pure: bytes and structs.

The answers are what ``huggingface_hub.InferenceClient`` parses; tasks that it does not know (multiple choice) are
answered in this project's own shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Prediction, Request
from bertology_serve.errors import DataError, Unsupported
from bertology_serve.files import JsonMapping, JsonObject
from bertology_serve.serving.protocol.json_codec import check_items, decode, encode, encode_list, flag, shown
from bertology_serve.tasks import spec as tasks
from bertology_serve.tasks.redaction import REDACTION_FIELDS
from bertology_serve.tasks.vectors import FLOAT, PROMPT_FIELDS, VECTOR_FIELDS


@dataclass(frozen=True)
class TaskCall:
    """The requests of one body. ``single``: ``inputs`` was one item, not a list; ``similarity``: the first request is
    the sentence that the others are compared with.
    """

    delta: Delta
    options: Options
    requests: list[Request]
    single: bool
    similarity: bool = False


def read_task(body: bytes, delta: Delta, most: float = math.inf) -> TaskCall:
    """A call of ``POST /models/{delta}``; raises DataError, Unsupported for options that would not be honoured, and
    LimitError for more than ``most`` items.
    """
    value: Any = decode(body)
    if not isinstance(value, dict):
        raise DataError(f"the body is {shown(value)}; expected an object with 'inputs'")
    if "inputs" not in value:
        raise DataError("field 'inputs' is missing; expected a text, an object with the task's fields, or a list")
    options = read_options(value, delta)
    inputs = value["inputs"]
    if delta.task.kind == tasks.EMBEDDING and isinstance(inputs, dict) and "source_sentence" in inputs:
        return _similarity(inputs, delta, options, most)
    items = inputs if isinstance(inputs, list) else [inputs]
    check_items(len(items), most)
    requests = [_request(item, f"inputs[{index}]", delta, options) for index, item in enumerate(items)]
    return TaskCall(delta, options, requests, single=not isinstance(inputs, list))


def write_task(call: TaskCall, predictions: Sequence[Prediction]) -> bytes:
    """The answers in the shape of the delta's task."""
    if call.similarity:
        source, *others = (prediction.answer["embedding"] for prediction in predictions)
        return encode([cosine(source, other) for other in others])
    shape = SHAPES[call.delta.task.kind]
    answers = [shape.answer(prediction, call.options) for prediction in predictions]
    return encode(answers[0]) if call.single and not shape.nested else encode_list(answers)


def _request(item: Any, where: str, delta: Delta, options: Options) -> Request:
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, dict):
        raise DataError(f"{where}: is {shown(item)}; expected a text or an object with the fields of {delta.task.kind}")
    if delta.task.kind == tasks.QUESTION_ANSWERING and options.top_k is not None:
        item = {**item, "top_k": options.top_k}
    item = {**options.fields, **item}
    return Request(delta.name, item, "", options.needs_logits, where)


def _similarity(inputs: JsonObject, delta: Delta, options: Options, most: float) -> TaskCall:
    sentences = inputs.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise DataError(f"field 'sentences' is {shown(sentences)}; expected a list of texts")
    check_items(1 + len(sentences), most)
    texts = [inputs["source_sentence"], *sentences]
    names = ["source_sentence", *(f"sentences[{index}]" for index in range(len(sentences)))]
    requests = [
        Request(delta.name, {"text": text, **options.fields, "encoding_format": FLOAT}, where=name)
        for text, name in zip(texts, names, strict=True)
    ]
    return TaskCall(delta, options, requests, single=False, similarity=True)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two vectors; 0 where one of them is."""
    product = sum(a * b for a, b in zip(one, other, strict=True))
    sizes = sum(a * a for a in one) * sum(b * b for b in other)
    return float(product / sizes**0.5) if sizes else 0.0


TRANSFORMS = ("softmax", "sigmoid", "none")
GROUPED = ("simple", "first", "average", "max")
_KNOWN = {
    tasks.CLASSIFICATION: ("top_k", "function_to_apply"),
    tasks.MULTI_LABEL: ("top_k", "function_to_apply"),
    tasks.REGRESSION: (),
    tasks.TOKEN_CLASSIFICATION: ("aggregation_strategy", "ignore_labels", *sorted(REDACTION_FIELDS)),
    tasks.QUESTION_ANSWERING: ("top_k", "offsets"),
    tasks.MULTIPLE_CHOICE: (),
    tasks.EMBEDDING: (*VECTOR_FIELDS, "truncate", *PROMPT_FIELDS),
    tasks.ZERO_SHOT: ("candidate_labels", "hypothesis_template", "multi_label", "top_k"),
    tasks.SPARSE: ("truncate", *PROMPT_FIELDS),
    tasks.MULTI_VECTOR: ("normalize", "truncate", *PROMPT_FIELDS),
}
FIELDS = (*REDACTION_FIELDS, *PROMPT_FIELDS, *VECTOR_FIELDS)
# What counts as an option beside ``inputs`` too, where InferenceClient puts those of embeddings; other keys are ignored
_OPTIONS = frozenset(sum(_KNOWN.values(), ())) | {
    "stride", "align_to_words", "doc_stride", "handle_impossible_answer", "max_answer_len", "max_question_len",
    "max_seq_len", "truncation_direction",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What a call asks for; ``None`` is the task's default.

    ``fields`` are those that every record of the call gets: what is asked of redaction, offsets, prompts, vectors and
    labels.
    """

    top_k: int | None = None
    transform: str = ""
    ignore_labels: tuple[str, ...] = ()
    fields: JsonMapping = field(default_factory=dict)

    @property
    def needs_logits(self) -> bool:
        """Whether the answer is made from logits."""
        return bool(self.transform)


def read_options(body: JsonObject, delta: Delta) -> Options:
    """The options of a body, under ``parameters`` or beside ``inputs``. Unsupported for those that the task lacks: a
    delta has decided them in its training, most deltas their labels too."""
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
    options = Options(
        top_k=_integer(given, "top_k", 20 if kind == tasks.QUESTION_ANSWERING else 100_000),
        transform=_transform(given, kind),
        ignore_labels=_texts(given, "ignore_labels"),
        fields={name: given[name] for name in FIELDS if name in given} | _asked(given),
    )
    _choice(given, "aggregation_strategy", GROUPED, "simple")
    if not flag(given, "truncate", True, "option") and delta.task.long == "cut":
        raise Unsupported("texts are always cut to the delta's maximum length; leave 'truncate' out")
    return options


def _integer(given: JsonObject, name: str, most: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise DataError(f"option {name!r} is out of range; expected an integer from 1 to {most}")
    return value


def _choice(given: JsonObject, name: str, choices: tuple[str, ...], default: str) -> str:
    value = given.get(name, default)
    if value not in choices:
        raise DataError(f"option {name!r} is not supported with this value; expected one of {', '.join(choices)}")
    return str(value)


def _transform(given: JsonObject, kind: str) -> str:
    """What makes scores of logits; empty where that is what the task does anyway."""
    own = {tasks.CLASSIFICATION: "softmax", tasks.MULTI_LABEL: "sigmoid"}.get(kind, "softmax")
    chosen = _choice(given, "function_to_apply", TRANSFORMS, own)
    return "" if chosen == own else chosen


def _texts(given: JsonObject, name: str) -> tuple[str, ...]:
    value = given.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DataError(f"option {name!r} is {shown(value)}; expected a list of labels")
    return tuple(value)


def _asked(given: JsonObject) -> JsonObject:
    """The fields of a zero-shot record that options name; labels may be in one text, with commas."""
    found = {name: given[option] for option, name in _FIELDS.items() if option in given}
    if isinstance(labels := found.get("labels"), str):
        found["labels"] = [label.strip() for label in labels.split(",") if label.strip()]
    return found


_FIELDS = {"candidate_labels": "labels", "hypothesis_template": "template", "multi_label": "multi_label"}


@dataclass(frozen=True)
class AnswerShape:
    """``answer`` makes one item's answer; ``nested``: a single text, too, is answered with a list of answers."""

    answer: Callable[[Prediction, Options], Any]
    nested: bool = False


def classification(prediction: Prediction, options: Options) -> list[JsonObject]:
    """``[{label, score}]``, best first."""
    scores: dict[str, float] = prediction.answer["scores"]
    if options.needs_logits:
        scores = dict(zip(scores, prediction.answer["logits"], strict=True))
        scores = dict(zip(scores, _APPLIED[options.transform](list(scores.values())), strict=True))
    ranked = sorted(scores.items(), key=lambda item: -item[1])
    return [{"label": label, "score": score} for label, score in ranked[: options.top_k]]


def regression(prediction: Prediction, options: Options) -> list[JsonObject]:
    """``[{label: "value", score}]``, as a classification with one label."""
    return [{"label": "value", "score": prediction.answer["value"]}]


def tokens(prediction: Prediction, options: Options) -> list[JsonObject] | JsonObject:
    """``[{entity_group, score, word, start, end}]``; those under ``entities`` beside what redaction gives."""
    found = [
        {"entity_group": entity["label"], "score": entity["score"], "word": entity["text"], **_ends(entity)}
        for entity in prediction.answer["entities"]
        if entity["label"] not in options.ignore_labels
    ]
    more = {name: prediction.answer[name] for name in REDACTED if name in prediction.answer}
    return {"entities": found, **more} if more else found


def question(prediction: Prediction, options: Options) -> Any:
    """``{answer, score, start, end}``, or a list of them when more than one was asked for."""
    found = prediction.answer.get("answers", [prediction.answer["answer"]])
    answers = [{"answer": answer["text"], "score": answer["score"], **_ends(answer)} for answer in found]
    return answers if (options.top_k or 1) > 1 else answers[0]


REDACTED = ("redacted", "redactions", "placeholders")


def _ends(span: JsonMapping) -> JsonObject:
    return {name: span[name] for name in ("start", "end", "start_utf16", "end_utf16") if name in span}


def embedding(prediction: Prediction, options: Options) -> Any:
    """The vector, as the call's fields have it; by name where an item asks for several, or for chunks."""
    return prediction.answer.get("embedding", prediction.answer)


def sparse(prediction: Prediction, options: Options) -> list[JsonObject]:
    """``[{index, value}]`` in the order of the vocabulary, as TEI has it."""
    found = ({"index": entry["index"], "value": entry["value"]} for entry in prediction.answer["sparse"])
    return sorted(found, key=lambda entry: int(entry["index"]))


def vectors(prediction: Prediction, options: Options) -> list[list[float]]:
    """A vector a token."""
    rows: list[list[float]] = prediction.answer["vectors"]
    return rows


def own(prediction: Prediction, options: Options) -> JsonObject:
    """This project's own shape."""
    return prediction.as_dict()


SHAPES = {
    tasks.CLASSIFICATION: AnswerShape(classification, nested=True),
    tasks.MULTI_LABEL: AnswerShape(classification, nested=True),
    tasks.REGRESSION: AnswerShape(regression, nested=True),
    tasks.TOKEN_CLASSIFICATION: AnswerShape(tokens),
    tasks.QUESTION_ANSWERING: AnswerShape(question),
    tasks.EMBEDDING: AnswerShape(embedding),
    tasks.ZERO_SHOT: AnswerShape(classification),
    tasks.SPARSE: AnswerShape(sparse),
    tasks.MULTI_VECTOR: AnswerShape(vectors),
    tasks.MULTIPLE_CHOICE: AnswerShape(own),
}


def sigmoid(logit: float) -> float:
    """1 / (1 + exp(-logit)) that does not overflow."""
    return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1.0 + math.exp(logit))


def softmax(logits: Sequence[float]) -> list[float]:
    """Shares that add up to 1."""
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


_APPLIED: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "softmax": softmax,
    "sigmoid": lambda logits: [sigmoid(logit) for logit in logits],
    "none": list,
}
