"""What each token adds to an answer: integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365), by captum.

The path runs from [PAD] in the place of every token to the text; [CLS] and [SEP] stand on it from the start. Captum is
the extra ``attribution``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bertology_serve.analysis.subject_model import Subject
from bertology_serve.encoder.batch import read
from bertology_serve.errors import Unsupported
from bertology_serve.tasks.spec import Encoding


def check_available() -> None:
    """Raises Unsupported where captum is not installed."""
    if importlib.util.find_spec("captum") is None:
        raise Unsupported(
            "token attributions need captum, which is not installed; pip install 'bertology-serve[attribution]', "
            "or leave them out (--no-attributions)"
        )


def attributions(
    subject: Subject, encoding: Encoding, scalar: Callable[[Tensor], Tensor], steps: int
) -> tuple[list[float], float]:
    """What each token adds to ``scalar`` of the head's output [n, C] -> [n], and what the sum of all misses.

    The second is F(text) - F(baseline) - Σ, by which the number of ``steps`` is judged.
    """
    check_available()
    from captum.attr import IntegratedGradients

    def answer(vectors: Tensor) -> Tensor:
        return scalar(run_vectors(subject, encoding, vectors))

    vectors, baseline = _ends(subject, encoding)
    found, missed = IntegratedGradients(answer, multiply_by_inputs=True).attribute(
        vectors, baseline, n_steps=steps, internal_batch_size=16, return_convergence_delta=True
    )
    return found.sum(-1)[0].double().tolist(), float(missed.abs().max())


def _ends(subject: Subject, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """The word vectors [1, n, E] of a text, and of the baseline."""
    encoder = subject.encoder
    tokenizer = encoder.tokenizer
    pad = tokenizer.pad_token_id or 0
    kept = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    ids = torch.tensor([encoding.ids], device=encoder.device)
    bare = torch.tensor([[id if id in kept else pad for id in encoding.ids]], device=encoder.device)
    table = encoder.model.get_input_embeddings()
    with torch.no_grad():
        return table(ids).clone(), table(bare).clone()


def run_vectors(subject: Subject, encoding: Encoding, vectors: Tensor) -> Tensor:
    """The head's output [n, C] for one text, its word vectors [n, length, E] taken from the caller."""
    batch = subject.pack([encoding] * len(vectors))
    rows = torch.cat([vectors[original] for original in batch.order])

    def replaced(_: Any, __: Any, words: Tensor) -> Tensor:
        return words.index_copy(0, batch.text_rows, rows.to(words.dtype))

    handle = subject.encoder.model.get_input_embeddings().register_forward_hook(replaced)
    try:
        hidden = subject.run(batch)
    finally:
        handle.remove()
    assert subject.delta is not None
    packed = sorted(range(batch.sequences), key=batch.order.__getitem__)
    return read(hidden, batch, packed, subject.delta.task, subject.head)
