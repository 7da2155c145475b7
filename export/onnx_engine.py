"""The second engine: the encoder's packed batches, run by ONNX Runtime as one graph for all resident deltas."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bertology_serve.deltas.delta import bare
from bertology_serve.encoder.bank import BankEntry, DeltaBank
from bertology_serve.encoder.batch import PackedBatch
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import Unsupported
from bertology_serve.export.emitter.delta_inputs import Feed, texts
from bertology_serve.export.emitter.emit import emit_hidden, obstacle
from bertology_serve.export.export_inputs import ExportInputs, parts_of
from bertology_serve.export.export_spec import MultiPrecision, fastest_on_cpu
from bertology_serve.export.metadata import save
from bertology_serve.export.session import Session


class OnnxEngine:
    """``run`` gives the rows that ``Encoder.run`` gives, from the same batches and the same bank.

    The graph is made once, of the encoder alone; deltas are its inputs and come and go in the bank. It holds a copy of
    the encoder's weights of its own. Batches with deltas that the graph has no place for, factors on what several
    linears read, are run by torch. Raises Unsupported for an encoder that it cannot take, or without ONNX Runtime.
    """

    def __init__(self, encoder: Encoder, precision: MultiPrecision = "fp32", opset: int | None = None) -> None:
        self.encoder, self.parts, self.precision = encoder, parts_for(encoder), precision
        self._packs = encoder.prepacked
        self._feed, self._hidden = Feed(encoder.anatomy), encoder.anatomy.hidden
        with tempfile.TemporaryDirectory(prefix="bertology-serve-") as directory:
            path = Path(directory) / "model.onnx"
            # weights in a file of their own are mapped into memory: what is never read, most of the words, takes none
            save(emit_hidden(self.parts, opset or fastest_on_cpu(precision), precision), path, external_over=0)
            self._session = Session(path)

    @property
    def name(self) -> str:
        """For people: the runtime, its version, and the precision."""
        return f"onnxruntime {self._session.version}, {self.precision}"

    def takes(self, entry: BankEntry) -> bool:
        """Whether the graph has a place for all that a delta changes."""
        return self._feed.takes([entry])

    def run(self, batch: PackedBatch, pools: DeltaBank) -> Tensor:
        """The hidden states [T, H], float32, of every row of a packed batch; sequences of like length run together."""
        if not self._feed.takes(batch.entries):
            self.encoder.prepack(self._packs)
            return self.encoder.run(batch, pools)
        stacks, groups = self._feed.stacks(pools), buckets(batch.lengths, self._hidden)
        if len(groups) == 1:
            return torch.from_numpy(self._rows(batch, groups[0], stacks))
        hidden = torch.empty(batch.rows, self._hidden)
        for group in groups:
            at = np.concatenate([np.arange(batch.starts[i], batch.starts[i] + batch.lengths[i]) for i in group])
            hidden.index_copy_(0, torch.from_numpy(at), torch.from_numpy(self._rows(batch, group, stacks)))
        return hidden

    def _rows(self, batch: PackedBatch, group: list[int], stacks: dict[str, np.ndarray]) -> np.ndarray:
        """The rows of some sequences, one after the other."""
        tables = self._feed.tables([batch.entries[i] for i in group])
        out = self._session.run(stacks | tables | texts(batch, group, self.parts.inputs))
        return out[: sum(batch.lengths[i] for i in group)]


def parts_for(encoder: Encoder, instead: str = "take --engine torch") -> ExportInputs:
    """The encoder without a delta, as the graph is made of it; Unsupported, saying what to do ``instead``."""
    if encoder.device.type != "cpu" or encoder.dtype != torch.float32:
        raise Unsupported(
            f"the graph for many deltas is made of float32 encoders on the CPU, this one is {encoder.dtype} on "
            f"{encoder.device}; {instead}"
        )
    parts = parts_of(encoder, bare("base", encoder.ref, encoder.max_tokens), False)
    stands_in_the_way = obstacle(parts) or (None if encoder.packs else f"{encoder.anatomy.family} is padded")
    if stands_in_the_way:
        raise Unsupported(f"there is no graph for many deltas of this encoder: {stands_in_the_way}; {instead}")
    return parts


FIXED = 60
"""What a run of the graph costs besides its rows, for each unit of the encoder's width, in places of the grid [R, R].

A run reads all weights once and starts some hundred nodes.
"""


def buckets(lengths: Sequence[int], hidden: int, fixed: int = FIXED) -> list[list[int]]:
    """Indices of sequences, those of a bucket in their order, so cut that ``Σ (count · longest² + fixed · hidden)`` is
    smallest (by dynamic programming over the distinct lengths)."""
    sizes, counts = np.unique(np.asarray(lengths), return_counts=True)
    if counts.sum() * int(sizes[-1]) ** 2 - (counts * sizes**2).sum() <= fixed * hidden:
        return [list(range(len(lengths)))]
    edges = _edges(sizes, np.concatenate([[0], np.cumsum(counts)]), fixed * hidden)
    number = np.searchsorted(edges, np.asarray(lengths))
    return [np.flatnonzero(number == bucket).tolist() for bucket in range(len(edges))]


def _edges(sizes: np.ndarray, before: np.ndarray, price: int) -> list[int]:
    """The longest length of each bucket, rising; ``before[i]`` sequences are shorter than ``sizes[i]``."""
    best, cut = np.zeros(len(sizes) + 1), np.zeros(len(sizes) + 1, int)
    for end in range(1, len(sizes) + 1):
        costs = best[:end] + (before[end] - before[:end]) * float(sizes[end - 1]) ** 2 + price
        cut[end] = int(costs.argmin())
        best[end] = costs[cut[end]]
    edges, end = [], len(sizes)
    while end:
        edges.append(int(sizes[end - 1]))
        end = cut[end]
    return edges[::-1]
