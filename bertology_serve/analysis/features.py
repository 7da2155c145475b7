"""What every layer makes of texts and words, gathered from one pass over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bertology_serve.analysis.subject import Advance, Subject, batches, silent, text_rows
from bertology_serve.tasks.heads import pool
from bertology_serve.tasks.spec import Encoding


@dataclass(frozen=True)
class Features:
    """``texts`` [L + 1, sequences, H] pooled, ``words`` [L + 1, wanted rows, H]; float32 on the CPU, layer 0 embeds."""

    texts: Tensor
    words: Tensor


@torch.inference_mode()
def gather(
    subject: Subject,
    encodings: Sequence[Encoding],
    wanted: Sequence[Sequence[int]],
    pooling: str = "mean",
    max_tokens: int = 4096,
    advance: Advance = silent,
) -> Features:
    """Features of each sequence, and of its ``wanted`` rows (numbers within the text), in the order given."""
    anatomy = subject.encoder.anatomy
    firsts = [0]
    for rows in wanted:
        firsts.append(firsts[-1] + len(rows))
    texts = torch.empty(anatomy.layers + 1, len(encodings), anatomy.hidden)
    words = torch.empty(anatomy.layers + 1, firsts[-1], anatomy.hidden)
    done = 0
    for members in batches([len(encoding) for encoding in encodings], max_tokens):
        batch = subject.pack([encodings[i] for i in members])
        owners = [members[original] for original in batch.order]
        lengths = torch.tensor(batch.text_lengths, device=batch.ids.device)
        chosen = [own[list(wanted[i])] for i, own in zip(owners, text_rows(batch), strict=True)]
        places = torch.cat([torch.arange(firsts[i], firsts[i + 1]) for i in owners])
        for layer, hidden in enumerate(subject.layers(batch)):
            texts[layer, owners] = pool(hidden, batch.text_rows, lengths, pooling).float().cpu()
            words[layer, places] = hidden[torch.cat(chosen)].float().cpu()
        done += len(members)
        advance(done, len(encodings))
    return Features(texts, words)
