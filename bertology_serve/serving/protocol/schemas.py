"""The bodies that calls and answers have, as structs: what the OpenAPI document is made from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from bertology_serve.files import JsonObject
from bertology_serve.serving.protocol.oip import InferRequest
from bertology_serve.serving.versions.desired import Desired
from bertology_serve.tasks.answers import Answer, Model, Reconciled, SeveralAnswers, Version


class RecordBody(Struct, omit_defaults=True, kw_only=True):
    """The fields that many tasks read."""

    id: Annotated[str | int | None, Meta(description="Repeated in the answer.")] = None
    logits: Annotated[bool, Meta(description="Give the raw output of each head too.")] = False
    text: str | None = None
    text_pair: str | None = None
    tokens: list[str] | None = None
    question: str | None = None
    context: str | None = None
    labels: Annotated[list[str] | None, Meta(description="zero-shot: what to choose from.")] = None
    multi_label: Annotated[bool | None, Meta(description="zero-shot: any number of labels may apply.")] = None
    template: Annotated[str | None, Meta(description="zero-shot: put around labels, {} in their place.")] = None


class ItemBody(RecordBody, omit_defaults=True, kw_only=True):
    """One item for one delta: the fields that its task reads."""

    delta: Annotated[str, Meta(description="Name of a delta, or 'base' for the bare encoder's embeddings.")]
    premise: str | None = None
    choices: list[str] | None = None
    redact: Annotated[
        bool | str | dict[str, str] | None,
        Meta(description="What becomes of entities: keep, mask, hash or replace, for all or by label (* is the rest)."),
    ] = None
    patterns: Annotated[
        bool | str | list[str] | dict[str, str] | None,
        Meta(description="Expressions looked for beside the model: all, some by name, or a policy for each."),
    ] = None
    offsets: Annotated[Literal["characters", "utf16"], Meta(description="utf16: spans in those units too.")] = (
        "characters"
    )
    input_type: Annotated[str | None, Meta(description="What an embedding's text is: query, document, ...")] = None
    prompt_name: Annotated[str | None, Meta(description="A prompt of the delta, by its name.")] = None
    dimensions: Annotated[int | None, Meta(description="An embedding's first ones alone, scaled anew.")] = None
    encoding_format: Format = "float"
    embedding_types: Annotated[list[Format] | None, Meta(description="Several formats, answered by name.")] = None
    pooling: Annotated[str | None, Meta(description="chunks: a vector of each part of the text.")] = None
    chunks: Annotated[list[list[int]] | None, Meta(description="Start and end of each part, in characters.")] = None
    chunk_tokens: Annotated[int | None, Meta(description="Tokens of each part, where there are no chunks.")] = None


class SeveralBody(RecordBody, omit_defaults=True, kw_only=True):
    """One item for several deltas: the fields that their tasks read."""

    deltas: Annotated[list[str], Meta(description="Names of deltas, each once; 'base' is the bare encoder.")]


class TaskBody(Struct, omit_defaults=True):
    """HuggingFace's task shape; options may stand under ``parameters`` or beside ``inputs``."""

    inputs: Annotated[
        str | JsonObject | list[str | JsonObject],
        Meta(description="A text; an object with the task's fields, or source_sentence and sentences; or a list."),
    ]
    parameters: JsonObject | None = None


Format = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]
VectorNumbers = list[float] | str


class EmbeddingsBody(Struct, omit_defaults=True):
    """OpenAI's embeddings request; other keys are ignored."""

    model: Annotated[str, Meta(description="Name of a delta whose task is embedding, or 'base'.")]
    input: str | list[str]
    encoding_format: Format = "float"
    dimensions: int | None = None
    input_type: Annotated[str | None, Meta(description="query, document, ...: chooses the delta's prompt.")] = None


class Vector(Struct):
    """One embedding: numbers, codes, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: VectorNumbers


class Usage(Struct):
    """What the texts cost, prompts of the delta included."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Struct):
    """OpenAI's embeddings answer."""

    object: Literal["list"]
    data: list[Vector]
    model: str
    usage: Usage


class EmbedBody(Struct, omit_defaults=True):
    """Cohere's embeddings request; other keys are ignored."""

    model: Annotated[str, Meta(description="Name of a delta whose task is embedding, or 'base'.")]
    texts: list[str]
    input_type: str | None = None
    embedding_types: list[Format] | None = None
    output_dimension: int | None = None


class TypedEmbeddings(Struct):
    """The vectors of all texts, by type."""

    id: str
    texts: list[str]
    embeddings: dict[str, list[VectorNumbers]]
    meta: JsonObject
    response_type: Literal["embeddings_by_type"]


class RerankBody(Struct, omit_defaults=True):
    """Cohere's and Jina's ranking request; other keys are ignored."""

    model: Annotated[str, Meta(description="Name of a delta: a regression on pairs, or an embedding.")]
    query: str
    documents: list[str | JsonObject]
    top_n: int | None = None
    return_documents: bool | None = None


class Rank(Struct, omit_defaults=True):
    """A document's place in the request, and how well it fits."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class Ranks(Struct):
    """The documents, best first."""

    id: str
    model: str
    results: list[Rank]
    usage: Usage


class ScoreBody(Struct, omit_defaults=True):
    """vLLM's pairs of texts: one beside many, or as many beside as many."""

    model: Annotated[str, Meta(description="Name of a delta: a regression on pairs, or an embedding.")]
    text_1: str | list[str]
    text_2: str | list[str]
    use_activation: bool | None = None


class Score(Struct):
    """The score of one pair."""

    index: int
    object: Literal["score"]
    score: float


class PoolingAnswer(Struct):
    """What vLLM's answers have in common."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: Usage


class Scores(PoolingAnswer):
    """vLLM's answer to pairs."""

    data: list[Score]


class ClassifyBody(Struct, omit_defaults=True):
    """vLLM's texts to be classified."""

    model: Annotated[str, Meta(description="Name of a delta whose task is classification.")]
    input: str | list[str]
    use_activation: bool | None = None


class Class(Struct):
    """One text's label, and the probabilities of all labels in the delta's order."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classes(PoolingAnswer):
    """vLLM's answer to texts."""

    data: list[Class]


class PredictBody(Struct):
    """KServe's instances: texts, or objects with the fields of the task."""

    instances: list[str | JsonObject]


class Predictions(Struct):
    """One answer an instance."""

    predictions: list[Answer]


class TeiBody(Struct, omit_defaults=True):
    """A body of Text Embeddings Inference, with ``model`` added; other keys are ignored."""

    inputs: str | list[str | list[str]]
    model: Annotated[str | None, Meta(description="Name of a delta; not needed below /tei/{delta}.")] = None
    normalize: bool = True
    truncate: bool = False
    dimensions: int | None = None
    encoding_format: Format = "float"
    prompt_name: str | None = None
    raw_scores: bool = False


class TeiClass(Struct):
    """A label and its score, in TEI's shape."""

    label: str
    score: float


class TeiSentences(Struct):
    """A sentence, and others that it is compared with."""

    source_sentence: str
    sentences: list[str]


class TeiSimilarityBody(Struct, omit_defaults=True):
    """Cosines of embeddings."""

    inputs: TeiSentences
    model: str | None = None
    truncate: bool = False


class TeiRerankBody(Struct, omit_defaults=True):
    """Texts to be ranked for a query, by a regression on pairs or by an embedding of any kind."""

    query: str
    texts: list[str]
    model: str | None = None
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool = False


class TeiTokenizeBody(Struct, omit_defaults=True):
    """Texts to be cut into tokens."""

    inputs: str | list[str]
    add_special_tokens: bool = True


class TeiDecodeBody(Struct, omit_defaults=True):
    """Token ids to be made texts."""

    ids: list[int | list[int]]
    skip_special_tokens: bool = True


class ServerMetadata(Struct):
    """What GET /v2 answers."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(Struct):
    """A tensor of a model; -1 is any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Struct):
    """A delta as a model of the Open Inference Protocol."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: JsonObject


class Tensor(Struct):
    """An output tensor; its data is flat, row-major, and missing where binary bytes follow the JSON."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: JsonObject | None = None


class InferResponse(Struct, omit_defaults=True):
    """The answer to an infer request."""

    model_name: str
    outputs: list[Tensor]
    model_version: str | None = None
    id: str | None = None
    parameters: Annotated[
        JsonObject | None, Meta(description="truncated: the rows whose texts were cut, with commas between them.")
    ] = None


class IndexRequest(Struct):
    """What to list; the body may be empty."""

    ready: bool = False


class LoadRequest(Struct):
    """``parameters.version`` names a version of the served directory; without it, or without a body, the newest."""

    parameters: JsonObject | None = None


class Problem(Struct):
    """What went wrong."""

    error: str


class OpenAIError(Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIProblem(Struct):
    """What went wrong, under /v1."""

    error: OpenAIError


BODIES = (
    ItemBody, Answer, SeveralBody, SeveralAnswers, TaskBody, Model, ServerMetadata, ModelMetadata, InferRequest,
    InferResponse, TeiBody, TeiClass, TeiSimilarityBody, TeiRerankBody, TeiTokenizeBody, TeiDecodeBody,
    RerankBody, Ranks, ScoreBody, Scores, ClassifyBody, Classes, PredictBody, Predictions,
    EmbeddingsBody, Embeddings, EmbedBody, TypedEmbeddings, IndexRequest, LoadRequest, Desired, Reconciled,
    Version, Problem, OpenAIProblem,
)  # fmt: skip
