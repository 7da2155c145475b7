"""Several deltas under training in one packed pass: the rows of each are changed by it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bertology_serve.encoder.bank import BARE, LiveBank
from bertology_serve.encoder.live import LiveDelta
from bertology_serve.encoder.packing import PackedBatch, pack
from bertology_serve.encoder.reading import read
from bertology_serve.tasks.spec import Encoding


@dataclass(frozen=True)
class Share:
    """What one delta has in a pass: ``sequences`` are the places of its encodings, in order, in the packed batch."""

    live: LiveDelta
    hidden: Tensor
    batch: PackedBatch
    sequences: tuple[int, ...]

    def output(self) -> Tensor:
        """The delta's head over its own rows, as ``LiveDelta`` itself gives it."""
        return read(self.hidden, self.batch, self.sequences, self.live.task, self.live.head)


def run_together(parts: Sequence[tuple[LiveDelta, Sequence[Encoding]]]) -> list[Share]:
    """One pass over the encodings of several live deltas of one encoder; a delta may have several parts.

    Gradients reach each delta from its own rows only: they are those of a pass of its own.
    """
    encoder, training = parts[0][0].encoder, parts[0][0].training
    keys = {id(live): str(number) for number, (live, _) in enumerate(parts)}
    changing = {keys[id(live)]: live.effects() for live, _ in parts if live.specs}
    pools = LiveBank(list(changing.items()), training)
    entries = [pools.entries.get(keys[id(live)], BARE) for live, encodings in parts for _ in encodings]
    encodings = [encoding for _, own in parts for encoding in own]
    batch = pack(encodings, entries, encoder.anatomy, encoder.device, padded=not encoder.packs)
    hidden = encoder.run(batch, pools)
    places = sorted(range(batch.sequences), key=batch.order.__getitem__)
    shares, at = [], 0
    for live, own in parts:
        shares.append(Share(live, hidden, batch, tuple(places[at : at + len(own)])))
        at += len(own)
    return shares
