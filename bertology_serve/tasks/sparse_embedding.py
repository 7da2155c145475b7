"""Sparse embeddings (SPLADE, Formal et al. 2021, arXiv 2107.05720 and 2109.10086): weights of words of the vocabulary.

The head is that of a masked language model, whose last layer is the encoder's word embeddings: ``log(1 + max(0, s))``
of the largest score s that any row of the text, [CLS] and [SEP] included, gives a word. Most weights are to be 0, which
the training sees to (``contrastive.flops``), or the task's ``max_terms``. Texts are alike by the product of their
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertology_serve.tasks.contrastive import LOSSES, Products, Target, flops
from bertology_serve.tasks.embedding import Embedding, EmbeddingExample, loss_of
from bertology_serve.tasks.metrics import Floats
from bertology_serve.tasks.spec import SPARSE, Encoding
from bertology_serve.tasks.vectors import AS_GIVEN, VectorForm


class SparseEmbedding(Embedding):
    """Records as ``Embedding`` reads them.

    Answers ``sparse [{index, value, token}]``, the largest weights first; with a pair also ``sparse_pair`` and the
    product of both, ``similarity``; with negatives ``sparse_negatives``.
    """

    kind = SPARSE
    field = "sparse"
    tokenizer: PreTrainedTokenizerBase | None = None
    """The one that texts were last encoded with, which names the words."""

    def encode(self, example: EmbeddingExample, tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
        self.tokenizer = tokenizer
        return super().encode(example, tokenizer)

    def loss(self, out: Tensor, lengths: Sequence[int], targets: Sequence[Target]) -> Tensor:
        """The targets' loss, and the regulariser by its weight, of weights [S, V]; times the number of targets."""
        rows = self.kept(out if out.dtype == torch.float64 else out.float())
        loss = LOSSES[targets[0].loss or loss_of(targets[0])](Products(rows), targets)
        return (loss + targets[0].flops * flops(rows, targets)) * len(targets)

    def kept(self, rows: Tensor) -> Tensor:
        """The ``max_terms`` largest weights of each row [..., V], zeros elsewhere; all where that is 0."""
        if not 0 < self.spec.max_terms < rows.shape[-1]:
            return rows
        values, index = rows.topk(self.spec.max_terms)
        return torch.zeros_like(rows).scatter(-1, index, values)

    def written(self, output: Tensor, form: VectorForm = AS_GIVEN) -> Any:
        weights = self.kept(output)
        index = weights.nonzero().flatten()
        index = index[weights[index].argsort(descending=True, stable=True)]
        numbers = index.tolist()
        found = [{"index": one, "value": value} for one, value in zip(numbers, weights[index].tolist(), strict=True)]
        if self.tokenizer is not None:
            for one, token in zip(found, self.tokenizer.convert_ids_to_tokens(numbers), strict=True):
                one["token"] = token
        return found

    def similarity(self, one: Tensor, other: Tensor) -> float:
        return float(self.kept(one) @ self.kept(other))

    def searching(self, documents: Sequence[Any]) -> Callable[[Any], Floats]:
        owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
        index, values = _columns([entry for document in documents for entry in document])

        def search(query: Any) -> Floats:
            words, weights = _columns(query)
            own = np.zeros(1 + max(index.max(initial=0), words.max(initial=0)))
            own[words] = weights
            scores: Floats = np.bincount(owner, own[index] * values, len(documents)).astype(np.float64)
            return scores

        return search


def _columns(entries: Sequence[Any]) -> tuple[np.ndarray[Any, np.dtype[np.int64]], Floats]:
    index = np.array([entry["index"] for entry in entries], np.int64)
    return index, np.array([entry["value"] for entry in entries], np.float64)
