"""Embeddings: a vector a text, or what else texts are compared by (``sparse_embedding``, ``multi_vector``).

They are trained on pairs that belong together, on scored ones, or on negatives too. The shape of the records decides
which loss of ``contrastive`` is learnt, and what is measured: the correlation of the similarity with the scores where
there are any, else how well texts find what belongs to them among all texts of the set.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from bertology_serve.errors import DataError, nearest
from bertology_serve.tasks import metrics
from bertology_serve.tasks.base import Answer, Task, TextExample
from bertology_serve.tasks.contrastive import COSENT, DISTILL, LOSSES, MARGIN_MSE, MNRL, Cosines, Target
from bertology_serve.tasks.encoding import encode_long
from bertology_serve.tasks.fields import Record, check_text, kind_of, optional_text, read_list, read_score, read_text
from bertology_serve.tasks.metrics import Bounds, Floats
from bertology_serve.tasks.spec import EMBEDDING, Encoding, TaskSpec
from bertology_serve.tasks.vectors import AS_GIVEN, Chunks, ChunkTokens, VectorForm

QUERY, DOCUMENT = "query", "document"
# What callers say that a text is: Cohere's, Voyage's, Jina's and sentence-transformers' words
ROLES: Mapping[str, str] = {
    **dict.fromkeys((QUERY, "search_query", "retrieval.query"), QUERY),
    **dict.fromkeys((DOCUMENT, "search_document", "retrieval.passage", "passage", "corpus"), DOCUMENT),
    **{role: role for role in ("classification", "clustering", "separation", "text-matching")},
}
_NAMES = {DOCUMENT: (DOCUMENT, "passage", "corpus")}
NDCG, ACCURACY = "ndcg@10", "triplet_accuracy"
_NEGATIVE = re.compile(r"negatives?(_\d+)?")
MOST_NEGATIVES = 1000


@dataclass(frozen=True)
class EmbeddingExample(TextExample):
    """A text, what belongs to it (``text_pair``), and what does not.

    ``score`` says how alike text and pair are, ``scores`` what a teacher gives the pair and each negative. In a
    retrieval set each document has an ``id``, and each query what is ``relevant``: grades by documents' ids. ``query``
    says that the text is one, to tasks that tell them from documents. ``prompts`` are read before the text, and before
    the others; ``form`` is how vectors are answered, ``chunks`` which parts of the text get one each.
    """

    score: float | None = None
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    id: str | None = None
    relevant: Mapping[str, float] | None = None
    query: bool = False
    prompts: tuple[str, str] = ("", "")
    form: VectorForm = AS_GIVEN
    chunks: Chunks | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """Text, pair and negatives: what is embedded."""
        return self.text, *(() if self.text_pair is None else (self.text_pair,)), *self.negatives

    @property
    def prompted(self) -> tuple[str, ...]:
        """The texts behind their prompts: what is read."""
        first, *others = self.texts
        return self.prompts[0] + first, *(self.prompts[1] + text for text in others)

    @property
    def fields(self) -> dict[str, object]:
        own = {"text": self.text, "text_pair": self.text_pair, "negatives": list(self.negatives)}
        return {name: value for name, value in own.items() if value}


class Embedding(Task[EmbeddingExample, Target]):
    """Records ``{"text"}``, to train also ``text_pair`` (or ``positive``), and ``score`` or ``negative``s.

    sentence-transformers' names for the columns do too: ``anchor``, ``positive``, ``negative``, ``negative_1``, ...
    Where the delta has prompts, a text that has a pair is read as a query, what belongs to it and what does not as
    documents; a text alone as its ``input_type`` (``query``, ``document``, or a word of ``ROLES``) or its
    ``prompt_name`` says.

    A record may ask for vectors of fewer ``dimensions``, in another ``encoding_format``, or in several
    (``embedding_types``, answered by name under ``embeddings``); with ``pooling: "chunks"`` for a vector of each of its
    ``chunks`` (spans of characters) or of ``chunk_tokens`` tokens, answered under ``chunks``.

    Answers ``embedding`` [H]; with a pair also ``embedding_pair`` [H] and their cosine, ``similarity``; with negatives
    ``embedding_negatives``.
    """

    kind = EMBEDDING
    main_metric = "spearman"
    field: ClassVar[str] = "embedding"

    def example(self, record: Record, where: str, labelled: bool) -> EmbeddingExample:
        text = read_text(record, where, "text", "text_a", "anchor")
        pair = optional_text(record, where, "text_pair", "text_b", "positive")
        negatives = _negatives(record, where)
        if negatives and pair is None:
            raise DataError(f"{where}: there are negatives, and field 'positive' (or 'text_pair') is missing")
        prompts = prompts_for(self.spec, record, where, pair is not None)
        if not labelled:
            form, chunks = VectorForm.read(record, where, self.spec), Chunks.read(record, where, self.spec)
            if chunks is not None and pair is not None:
                raise DataError(f"{where}: field 'pooling' is 'chunks', and there is a pair; expected one text")
            return EmbeddingExample(where, text, pair, None, negatives, prompts=prompts, form=form, chunks=chunks)
        if pair is None and record.get("id") is None:
            raise DataError(
                f"{where}: field 'text_pair' (or 'positive') is missing; embeddings are trained on pairs, with a "
                "score, negatives, or neither"
            )
        if pair is None:
            relevant = _relevant(record, where)
            prompt = prompt_of(DOCUMENT if relevant is None else QUERY, self.spec.prompts)
            return EmbeddingExample(where, text, None, id=str(record["id"]), relevant=relevant, prompts=(prompt, ""))
        scored = any(record.get(name) is not None for name in ("score", "label"))
        score, scores = read_score(record, where) if scored else None, _scores(record, where, len(negatives))
        if negatives and score is not None:
            if scores or len(negatives) > 1:
                raise DataError(
                    f"{where}: field 'score' beside {len(negatives)} negatives; expected one negative (the score is "
                    "then by how much the positive is better), or 'scores' with a number for positive and negatives"
                )
            scores, score = (score, 0.0), None
        return EmbeddingExample(where, text, pair, score, negatives, scores, prompts=prompts)

    def encode(self, example: EmbeddingExample, tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
        offsets = example.chunks is not None
        found = [one for text in example.prompted for one in encode_long(tokenizer, text, None, self.spec, offsets)]
        if offsets:
            self._tokens(example, found)
        return found

    def target(self, example: EmbeddingExample, encodings: Sequence[Encoding]) -> Target:
        return Target(tuple(map(hash, example.texts)), example.score, example.scores)

    def aimed(
        self, examples: Sequence[EmbeddingExample], targets: Sequence[Target], loss: str, flops: float = 0.0
    ) -> list[Target]:
        """The targets of training examples with their loss; ``auto``: the one that the first calls for.

        Raises DataError for the first that it cannot learn from.
        """
        loss = loss_of(examples[0]) if loss == "auto" else loss
        return [
            target._replace(loss=_fitting(example, loss), flops=flops)
            for example, target in zip(examples, targets, strict=True)
        ]

    def loss(self, out: Tensor, lengths: Sequence[int], targets: Sequence[Target]) -> Tensor:
        """The targets' loss over the batch, times their number; of several ``dimensions`` the sum (Matryoshka)."""
        rows = out if out.dtype == torch.float64 else out.float()
        loss = LOSSES[targets[0].loss or loss_of(targets[0])]
        widths = self.spec.dimensions or (rows.shape[1],)
        return torch.stack([loss(Cosines(rows[:, :width]), targets) for width in widths]).sum() * len(targets)

    def decode(self, example: EmbeddingExample, encodings: Sequence[Encoding], outputs: Sequence[Tensor]) -> Answer:
        if example.chunks is not None:
            return {"chunks": self._chunks(example, encodings, outputs)}
        form = example.form
        form.check(outputs[0].shape[-1], self.spec, example.where)
        vectors = [form.cut(F.normalize(output, dim=-1) if self.spec.unit else output) for output in outputs]
        first, *others = [self.written(vector, form) for vector in vectors]
        answer: Answer = {"embeddings" if form.several else self.field: first}
        if others:
            answer[f"{self.field}_pair"] = others[0]
            answer["similarity"] = self.similarity(vectors[0].double(), vectors[1].double())
        if others[1:]:
            answer[f"{self.field}_negatives"] = others[1:]
        return answer

    def written(self, output: Tensor, form: VectorForm = AS_GIVEN) -> Any:
        return form.encoded(output, self.spec)

    def similarity(self, one: Tensor, other: Tensor) -> float:
        """How alike two texts are, by their outputs in float64."""
        return float(F.cosine_similarity(one, other, dim=0))

    def searching(self, documents: Sequence[Any]) -> Callable[[Any], Floats]:
        """What gives a query's similarity [D] with each document, all of them as ``written``."""
        table = unit_rows(documents)
        return lambda query: table @ unit_rows([query])[0]

    def _chunks(
        self, example: EmbeddingExample, encodings: Sequence[Encoding], outputs: Sequence[Tensor]
    ) -> list[Answer]:
        """Late chunking: of each chunk the mean of its tokens' rows, which have seen the whole text or, where it is
        long, all of a window (Günther et al. 2024, arXiv 2409.04701).
        """
        found = self._tokens(example, encodings)
        means, form = found.means(outputs), example.form
        vectors = form.cut(F.normalize(means) if self.spec.normalize else means)
        name = "embeddings" if form.several else "embedding"
        return [
            {"start": start, "end": end, name: form.encoded(vector, self.spec)}
            for (start, end), vector in zip(found.spans, vectors, strict=True)
        ]

    def _tokens(self, example: EmbeddingExample, encodings: Sequence[Encoding]) -> ChunkTokens:
        assert example.chunks is not None
        prompt, characters = len(example.prompts[0]), len(example.text)
        return example.chunks.tokens(encodings, prompt, characters, self.spec, example.where)

    def asks_rows(self, example: EmbeddingExample, hidden: int | None) -> bool:
        if hidden is not None:
            example.form.check(hidden, self.spec, example.where)
        return example.chunks is not None

    def metrics(self, answers: Sequence[Answer], examples: Sequence[EmbeddingExample]) -> dict[str, float]:
        """Spearman and Pearson correlation of the cosine with the gold score; without scores those of a search.

        A text searches all that belongs to any, and all negatives (a query, all documents). The main metric of each of
        the ``dimensions`` follows.
        """
        if _scored(examples):
            gold, found = self.parts(answers, examples).T
            own = {"spearman": metrics.spearman(gold, found), "pearson": metrics.pearson(gold, found)}
        else:
            own = metrics.mean_of(list(self._searched(answers, examples).values()))
            if any(example.negatives for example in examples):
                own[ACCURACY] = float(
                    np.mean([self._above(answer) for answer in answers if f"{self.field}_negatives" in answer])
                )
        name = next(iter(own))
        return own | {
            f"{name}_{width}": self.main(self.parts([_cut(answer, width) for answer in answers], examples))
            for width in self.spec.dimensions
        }

    def parts(self, answers: Sequence[Answer], examples: Sequence[EmbeddingExample]) -> Floats:
        """[N, 2]: the gold score and the cosine; without scores nDCG and 1 for each of the texts that search."""
        if not _scored(examples):
            return metrics.of_one([found[NDCG] for found in self._searched(answers, examples).values()])
        rows = zip(examples, answers, strict=True)
        return np.array([[float(example.score or 0.0), answer["similarity"]] for example, answer in rows])

    def quality(self, answers: Sequence[Answer], examples: Sequence[EmbeddingExample]) -> Floats:
        """1 less the distance of both scores, each in its standard deviations; or nDCG (1 for what does not search)."""
        if not _scored(examples):
            found = self._searched(answers, examples)
            return np.array([found.get(_searcher(example), {NDCG: 1.0})[NDCG] for example in examples])
        gold, cosine = ((side - side.mean()) / max(side.std(), 1e-12) for side in self.parts(answers, examples).T)
        near: Floats = 1.0 - np.abs(gold - cosine)
        return near

    def main(self, parts: Floats) -> float:
        return float(parts[:, 0].mean()) if (parts[:, 1] == 1).all() else metrics.spearman(*parts.T)

    def bounds(self, parts: Floats) -> Bounds:
        return metrics.SHARE if (parts[:, 1] == 1).all() else metrics.CORRELATION

    def _searched(
        self, answers: Sequence[Answer], examples: Sequence[EmbeddingExample]
    ) -> dict[tuple[str, str] | None, dict[str, float]]:
        """The metrics of each search among all that can be found in the set. DataError where nothing searches."""
        found: dict[str, Any] = {}
        asked: dict[tuple[str, str] | None, tuple[Any, dict[str, float]]] = {}
        for example, answer in zip(examples, answers, strict=True):
            key = _searcher(example)
            if key is None:
                found[str(example.id)] = answer[self.field]
                continue
            grades = asked.setdefault(key, (answer[self.field], {}))[1]
            if example.relevant is not None:
                grades.update(example.relevant)
            else:
                grades[str(example.text_pair)] = 1.0
                found |= zip(example.texts[1:], self._others(answer), strict=True)
        if not asked or not found:
            raise DataError(
                f"{examples[0].where}: there are {len(asked)} queries and {len(found)} documents; expected both"
            )
        search, places = self.searching(list(found.values())), {name: place for place, name in enumerate(found)}
        results = {}
        for key, (query, grades) in asked.items():
            scores, gold = search(query), np.zeros(len(places))
            for name, grade in grades.items():
                if name in places:
                    gold[places[name]] = grade
            if key is not None and key[0] == "id" and key[1] in places:
                scores[places[key[1]]] = -np.inf  # the query itself, as BEIR has it
            results[key] = metrics.of_ranking(gold[np.argsort(-scores, kind="stable")])
        return results

    def _others(self, answer: Answer) -> list[Any]:
        return [answer[f"{self.field}_pair"], *answer.get(f"{self.field}_negatives", ())]

    def _above(self, answer: Answer) -> bool:
        scores = self.searching(self._others(answer))(answer[self.field])
        return bool(scores[0] > scores[1:].max())


def prompts_for(spec: TaskSpec, record: Record, where: str, paired: bool = False) -> tuple[str, str]:
    """What is read before the text of a record, and before its others. Raises DataError for an unknown prompt."""
    known, name, role = dict(spec.prompts), record.get("prompt_name"), record.get("input_type")
    if name is not None:
        if not isinstance(name, str) or name not in known:
            raise DataError(f"{where}: field 'prompt_name' is {kind_of(name)}; this delta has {_names(known)}")
        return known[name], known[name]
    if role is None:
        default = known.get("", "")
        return (prompt_of(QUERY, spec.prompts), prompt_of(DOCUMENT, spec.prompts)) if paired else (default, default)
    if not isinstance(role, str) or (role not in ROLES and role not in known):
        raise DataError(f"{where}: field 'input_type' is {kind_of(role)}; {nearest(str(role), {*ROLES, *known})}")
    prompt = prompt_of(role, spec.prompts)
    return prompt, prompt


def prompt_of(role: str, prompts: Iterable[tuple[str, str]]) -> str:
    """The prompt before texts of a role; where there is none of its name, that before all."""
    known = dict(prompts)
    role = role if role in known else ROLES[role]
    return next((known[name] for name in _NAMES.get(role, (role,)) if name in known), known.get("", ""))


def _names(prompts: Mapping[str, str]) -> str:
    return f"prompts for {', '.join(sorted(filter(None, prompts))[:20])}" if prompts.keys() - {""} else "no prompts"


def loss_of(one: Target | EmbeddingExample) -> str:
    """The loss that the shape of a record calls for."""
    return MARGIN_MSE if one.scores else MNRL if one.score is None else COSENT


def _fitting(example: EmbeddingExample, loss: str) -> str:
    """The loss, if an example has what it needs. Raises DataError."""
    why = f"loss {loss} needs it (the shape of the first record decides; --loss says otherwise)"
    if example.text_pair is None:
        raise DataError(f"{example.where}: field 'text_pair' (or 'positive') is missing; expected pairs to train on")
    if loss == COSENT and example.score is None:
        raise DataError(f"{example.where}: field 'score' is missing; {why}")
    if loss == MARGIN_MSE and not example.scores:
        raise DataError(f"{example.where}: field 'scores' is missing, or there are no negatives; {why}")
    if loss == DISTILL and example.score is None and not example.scores:
        raise DataError(f"{example.where}: field 'scores' (of a pair, 'score') is missing; {why}")
    if loss.startswith(MNRL) and example.score is not None:
        raise DataError(
            f"{example.where}: field 'score' is there, and loss {loss} takes every pair as one that belongs together; "
            "keep the pairs that do, without their scores"
        )
    return loss


def _negatives(record: Record, where: str) -> tuple[str, ...]:
    """The texts under ``negative``, ``negatives`` and ``negative_1``, ...; each a text or a list of them."""
    found: list[str] = []
    for name in record:
        value = record[name] if _NEGATIVE.fullmatch(str(name)) else None
        if isinstance(value, str):
            found.append(check_text(value, where, name))
        elif value is not None:
            found += [check_text(item, where, f"{name}[{i}]") for i, item in enumerate(read_list(record, where, name))]
    if len(found) > MOST_NEGATIVES:
        raise DataError(f"{where}: there are {len(found)} negatives; expected at most {MOST_NEGATIVES}")
    return tuple(found)


def _scores(record: Record, where: str, negatives: int) -> tuple[float, ...]:
    if record.get("scores") is None:
        return ()
    values = read_list(record, where, "scores")
    found = tuple(read_score({"score": value}, f"{where}: scores[{index}]") for index, value in enumerate(values))
    if len(found) != 1 + negatives or not negatives:
        raise DataError(
            f"{where}: field 'scores' has {len(found)} numbers; expected one for the positive and one for each of "
            f"{negatives} negatives"
        )
    return found


def _relevant(record: Record, where: str) -> dict[str, float] | None:
    value = record.get("relevant")
    if value is None:
        return None
    if not isinstance(value, Mapping) or not value:
        raise DataError(f"{where}: field 'relevant' is {kind_of(value)}; expected grades by ids of documents")
    return {str(key): read_score({"score": grade}, f"{where}: relevant[{key!r}]") for key, grade in value.items()}


def _scored(examples: Sequence[EmbeddingExample]) -> bool:
    """Whether examples have scores. Raises DataError where some do."""
    lacking = next((example for example in examples if example.score is None), None)
    if lacking is not None and lacking.where != examples[0].where and examples[0].score is not None:
        raise DataError(f"{lacking.where}: field 'score' is missing; the first record has one, so all must")
    return lacking is None


def _searcher(example: EmbeddingExample) -> tuple[str, str] | None:
    """What tells one search from another: the text, or the query's id; None for what does not search."""
    if example.text_pair is not None:
        return "text", example.text
    return None if example.relevant is None else ("id", str(example.id))


def unit_rows(rows: Sequence[Sequence[float]]) -> Floats:
    """Rows [n, W] as float64, each of length 1."""
    vectors = np.asarray(rows, dtype=np.float64)
    unit: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _cut(answer: Answer, width: int) -> Answer:
    cut: Answer = {name: answer[name][:width] for name in ("embedding", "embedding_pair") if name in answer}
    if "embedding_negatives" in answer:
        cut["embedding_negatives"] = [vector[:width] for vector in answer["embedding_negatives"]]
    if "embedding_pair" in cut:
        cut["similarity"] = float(unit_rows([cut["embedding"]])[0] @ unit_rows([cut["embedding_pair"]])[0])
    return cut
