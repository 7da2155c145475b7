"""Multi-vector embeddings (ColBERT, Khattab & Zaharia 2020, arXiv 2004.12832): a vector a token, texts alike by MaxSim.

Each row of a text, [CLS] and [SEP] included, is brought to ``width`` numbers by one layer, and to length 1. Documents
have no vectors for punctuation; queries have one for every token, and are not expanded with [MASK].
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertology_serve.tasks.base import Answer
from bertology_serve.tasks.contrastive import LOSSES, MaxSims, Target
from bertology_serve.tasks.embedding import QUERY, ROLES, Embedding, EmbeddingExample, loss_of, unit_rows
from bertology_serve.tasks.encoding import encode_text
from bertology_serve.tasks.fields import Record
from bertology_serve.tasks.metrics import Floats
from bertology_serve.tasks.spec import MULTI_VECTOR, Encoding


class MultiVector(Embedding):
    """Records as ``Embedding`` reads them. A text without a pair is a document, unless the record has what is
    ``relevant`` to it, or ``"input_type": "query"``.

    Answers ``vectors`` [n, D] and the ``tokens`` that they are of; with a pair also ``vectors_pair`` and the MaxSim of
    the text, as a query, and its pair, ``similarity``; with negatives ``vectors_negatives``.
    """

    kind = MULTI_VECTOR
    field = "vectors"
    tokenizer: PreTrainedTokenizerBase | None = None
    """The one that texts were last encoded with, and the ids of what it has for punctuation."""
    punctuation: frozenset[int] = frozenset()

    def example(self, record: Record, where: str, labelled: bool) -> EmbeddingExample:
        found = super().example(record, where, labelled)
        role = record.get("input_type")
        asks = found.text_pair is not None or record.get("relevant") is not None
        return replace(found, query=asks if role is None else ROLES.get(str(role)) == QUERY)

    def encode(self, example: EmbeddingExample, tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
        if tokenizer is not self.tokenizer:
            vocabulary = tokenizer.get_vocab()
            self.punctuation = frozenset(vocabulary[mark] for mark in string.punctuation if mark in vocabulary)
            self.tokenizer = tokenizer
        found = [encode_text(tokenizer, text, None, self.spec.max_length) for text in example.prompted]
        return [self._marked(one, document=number > 0 or not example.query) for number, one in enumerate(found)]

    def _marked(self, encoding: Encoding, document: bool) -> Encoding:
        """A sequence whose ``words`` are -1 for tokens that get no vector; a text of punctuation alone keeps all."""
        skipped = self.punctuation if document and self.spec.skip_punctuation else frozenset()
        words = tuple(-1 if token in skipped else row for row, token in enumerate(encoding.ids))
        return replace(encoding, words=words if max(words) >= 0 else tuple(range(len(words))))

    def target(self, example: EmbeddingExample, encodings: Sequence[Encoding]) -> Target:
        rows = [word for encoding in encodings for word in encoding.words]
        skipped = tuple(row for row, word in enumerate(rows) if word < 0)
        return super().target(example, encodings)._replace(skipped=skipped)

    def loss(self, out: Tensor, lengths: Sequence[int], targets: Sequence[Target]) -> Tensor:
        """The targets' loss over the batch, of rows [sum(lengths), D]; times their number."""
        rows = out if out.dtype == torch.float64 else out.float()
        kept = torch.ones(len(rows), dtype=torch.bool)
        ends = [0, *accumulate(lengths)]
        firsts = accumulate((len(target.texts) for target in targets), initial=0)
        kept[[ends[first] + row for first, target in zip(firsts, targets, strict=False) for row in target.skipped]] = (
            False
        )
        sizes = [int(part.sum()) for part in torch.split(kept, list(lengths))]
        texts = MaxSims(rows[kept.to(rows.device)], sizes)
        return LOSSES[targets[0].loss or loss_of(targets[0])](texts, targets) * len(targets)

    def decode(self, example: EmbeddingExample, encodings: Sequence[Encoding], outputs: Sequence[Tensor]) -> Answer:
        rows = [[row for row, word in enumerate(encoding.words) if word >= 0] for encoding in encodings]
        answer = super().decode(example, encodings, [out[own] for out, own in zip(outputs, rows, strict=True)])
        if self.tokenizer is not None:
            answer["tokens"] = self.tokenizer.convert_ids_to_tokens([encodings[0].ids[row] for row in rows[0]])
        return answer

    def similarity(self, one: Tensor, other: Tensor) -> float:
        texts = MaxSims(torch.cat([one, other]), [len(one), len(other)])
        return float(texts.pairs(torch.tensor([0]), torch.tensor([1]))[0])

    def searching(self, documents: Sequence[Any]) -> Callable[[Any], Floats]:
        table = unit_rows([row for document in documents for row in document])
        starts = [0, *accumulate(len(document) for document in documents)][:-1]

        def search(query: Any) -> Floats:
            scores: Floats = np.maximum.reduceat(table @ unit_rows(query).T, starts, axis=0).sum(1)
            return scores

        return search
