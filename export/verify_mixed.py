"""The graph for many deltas in ONNX Runtime, mixed batches, against each delta alone on the torch engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from bertology_serve.export.delta_library import Library
from bertology_serve.export.emitter.delta_inputs import INDEX
from bertology_serve.export.emitter.emit import EMBEDDING, TOKEN_LOGITS
from bertology_serve.export.samples import Case, Reference
from bertology_serve.export.session import Session
from bertology_serve.export.verify import NEIGHBOURS, Bars, Output, Report, Tally


class Mixed:
    """A session with a library: rows of cases, each for a delta in turn."""

    def __init__(self, session: Session, library: Library, pad: int) -> None:
        self.session, self.library, self.pad = session, library, pad

    def rows(self, case: Case, owners: Sequence[int]) -> list[Output]:
        """Each sequence's own output, padding and other deltas' columns left out."""
        index = {INDEX: np.array(owners, np.int64)}
        outputs = self.session.outputs(case.arrays(self.pad) | index | self.library.arrays)
        found = []
        for row, owner in enumerate(owners):
            card = self.library.cards[owner]
            own = outputs[card.output][row]
            own = own[case.columns(row)] if card.output == TOKEN_LOGITS else own
            found.append(own if card.output == EMBEDDING else own[..., : card.columns])
        return found


def verify_mixed(
    mixed: Mixed,
    references: Sequence[Reference],
    numbers: Sequence[int],
    cases: Iterable[Case],
    bars: Bars,
) -> Report:
    """Compares on every case; ``references`` are deltas whose ``numbers`` in the library are these."""
    cases, tally = list(cases), Tally()
    for number, case in enumerate(cases):
        owners = dealt(number, len(case.encodings), len(references))
        mine = [references[owner] for owner in owners]
        expected = [one.outputs([text])[0].numpy() for one, text in zip(mine, case.encodings, strict=True)]
        found = mixed.rows(case, [numbers[owner] for owner in owners])
        tally.add(case.shape, expected, found, [one.task for one in mine])
    return tally.report(mixed.session, bars, _neighbours(mixed, cases, numbers))


def dealt(number: int, sequences: int, deltas: int) -> list[int]:
    """The deltas of a batch's sequences: each in turn, two neighbours now and then of the same one."""
    return [(number * 5 + row - row // 3) % deltas for row in range(sequences)]


def _neighbours(mixed: Mixed, cases: Sequence[Case], numbers: Sequence[int]) -> float:
    """The largest change of a row between its batch and alone, over the largest mixed batches."""
    sized = sorted(enumerate(cases), key=lambda one: sum(map(len, one[1].encodings)))
    changes = [0.0]
    for number, case in [one for one in sized if len(one[1].encodings) > 1][-NEIGHBOURS:]:
        owners = [numbers[owner] for owner in dealt(number, len(case.encodings), len(numbers))]
        for owner, encoding, together in zip(owners, case.encodings, mixed.rows(case, owners), strict=True):
            alone = mixed.rows(Case((encoding,), len(encoding), left=False), [owner])[0]
            changes.append(float(np.abs(alone - together).max()))
    return float(np.max(changes))
