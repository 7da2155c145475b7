"""Sentence embeddings: one vector a text, trained on scored pairs.

The loss is CoSENT (Su 2022, https://kexue.fm/archives/8847): ``log(1 + Σ exp(20 (cos_i - cos_j)))`` over all couples
of pairs (i, j) of a batch whose gold scores say that pair j is the more alike. Only the order of the scores matters,
so any scale will do; a batch with a single pair teaches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from bertology_serve.errors import DataError
from bertology_serve.tasks import metrics
from bertology_serve.tasks.base import Answer, Task, TextExample, read_pair
from bertology_serve.tasks.encoding import encode_long
from bertology_serve.tasks.fields import Record, read_score
from bertology_serve.tasks.metrics import Floats
from bertology_serve.tasks.spec import EMBEDDING, Encoding

SHARPNESS = 20.0


@dataclass(frozen=True)
class EmbeddingExample(TextExample):
    """``score`` says how alike text and pair are; None where nothing is known."""

    score: float | None = None


class Embedding(Task[EmbeddingExample, float]):
    """Records ``{"text"}``, or ``{"text", "text_pair", "score"}`` to train and to evaluate.

    Answers ``embedding`` [H]; with a pair also ``embedding_pair`` [H] and their cosine, ``similarity``.
    """

    kind = EMBEDDING
    main_metric = "spearman"

    def example(self, record: Record, where: str, labelled: bool) -> EmbeddingExample:
        text, pair = read_pair(record, where)
        if labelled and pair is None:
            raise DataError(f"{where}: field 'text_pair' is missing; embeddings are trained on scored pairs")
        return EmbeddingExample(where, text, pair, read_score(record, where) if labelled else None)

    def encode(self, example: EmbeddingExample, tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
        texts = [example.text] if example.text_pair is None else [example.text, example.text_pair]
        return [one for text in texts for one in encode_long(tokenizer, text, None, self.spec)]

    def target(self, example: EmbeddingExample, encodings: Sequence[Encoding]) -> float:
        return float(example.score or 0.0)

    def loss(self, out: Tensor, lengths: Sequence[int], targets: Sequence[float]) -> Tensor:
        """CoSENT over the batch, times the number of pairs; out is [2 n, H], text and pair in turn."""
        rows = out.float()
        cosine = SHARPNESS * F.cosine_similarity(rows[0::2], rows[1::2])
        gold = torch.tensor(targets, dtype=torch.float32, device=out.device)
        wrong = (cosine[:, None] - cosine[None, :])[gold[:, None] < gold[None, :]]
        return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), 0) * len(targets)

    def decode(self, example: EmbeddingExample, encodings: Sequence[Encoding], outputs: Sequence[Tensor]) -> Answer:
        if self.spec.normalize:
            outputs = [F.normalize(output, dim=0) for output in outputs]
        answer: Answer = {"embedding": outputs[0].tolist()}
        if len(outputs) == 2:
            answer["embedding_pair"] = outputs[1].tolist()
            answer["similarity"] = float(F.cosine_similarity(outputs[0].double(), outputs[1].double(), dim=0))
        return answer

    def metrics(self, answers: Sequence[Answer], examples: Sequence[EmbeddingExample]) -> dict[str, float]:
        """Spearman and Pearson correlation of the cosine with the gold score."""
        gold = [float(example.score or 0.0) for example in examples]
        found = [answer["similarity"] for answer in answers]
        return {"spearman": metrics.spearman(gold, found), "pearson": metrics.pearson(gold, found)}

    def parts(self, answers: Sequence[Answer], examples: Sequence[EmbeddingExample]) -> Floats:
        """[N, 2]: the gold score and the cosine."""
        return np.array(
            [
                [float(example.score or 0.0), answer["similarity"]]
                for example, answer in zip(examples, answers, strict=True)
            ]
        )

    def quality(self, answers: Sequence[Answer], examples: Sequence[EmbeddingExample]) -> Floats:
        """1 less the distance of both scores, each in its standard deviations."""
        gold, found = ((side - side.mean()) / max(side.std(), 1e-12) for side in self.parts(answers, examples).T)
        near: Floats = 1.0 - np.abs(gold - found)
        return near

    def main(self, parts: Floats) -> float:
        return metrics.spearman(*parts.T)
