"""A bank of deltas of every kind, and the graph that serves them beside the engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch

from bertology_serve.deltas.delta import bare
from bertology_serve.encoder.bank import BARE, BankEntry, DeltaBank
from bertology_serve.encoder.batch import pack
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.export.emitter.delta_inputs import Feed, texts
from bertology_serve.export.emitter.emit import emit_hidden
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import Precision
from tests import tiny
from tests.export.cases import DELTAS, FACTORS, encodings

EVERY = DELTAS | FACTORS
FAMILIES = [family for family in tiny.FAMILIES if not family.startswith("deberta")]


class Both:
    """The torch engine and the graph in ONNX Runtime, the same bank for both."""

    def __init__(self, encoder: Encoder, opset: int = 20, precision: Precision = "fp32") -> None:
        self.encoder, self.feed = encoder, Feed(encoder.anatomy)
        self.bank = DeltaBank(encoder.anatomy, encoder.dtype, encoder.device)
        self.entries: dict[str, BankEntry] = {"bare": BARE}
        self.parts = ExportInputs.of(encoder, bare("bare", encoder.ref, encoder.base_task), False)
        model = onnx_ir.to_proto(emit_hidden(self.parts, opset, precision))
        onnx.checker.check_model(model, full_check=opset < 23)
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def add(self, *names: str) -> None:
        """Makes deltas of ``cases`` resident."""
        for name in names:
            delta = tiny.delta(self.encoder, name, *EVERY[name], seed=list(EVERY).index(name))
            effects = delta.effects(self.encoder.anatomy)
            self.entries[name] = self.bank.add(name, effects) if delta.specs else BARE

    def rows(self, names: Sequence[str], lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Hidden rows of torch's and of the graph's, for one sequence a name."""
        encoder, entries = self.encoder, [self.entries[name] for name in names]
        batch = pack(encodings(tuple(lengths), len(self.parts.inputs) == 3), entries, encoder.anatomy, encoder.device)
        with torch.inference_mode():
            expected = encoder.run(batch, self.bank).numpy()
        return expected, self.run(batch)

    def run(self, batch) -> np.ndarray:
        """The graph's rows for a packed batch, the last tile's copies left out."""
        arrays = texts(batch, range(batch.sequences), self.parts.inputs)
        fed = arrays | self.feed.stacks(self.bank) | self.feed.tables(batch.entries)
        asked = {one.name: fed[one.name] for one in self.session.get_inputs()}
        return self.session.run(None, asked)[0][: batch.rows]


def mixed(family: str, directory: Path, names: Sequence[str], opset: int = 20) -> Both:
    """A small encoder with deltas."""
    both = Both(tiny.encoder(family, directory), opset)
    both.add(*names)
    return both
