"""Rows [H] of texts that come again, such as labels: the most recent ones of one version of a delta."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from threading import Lock

from torch import Tensor

MOST_ROWS, MOST_BYTES = 4096, 16 * 2**20


class RowCache:
    """Bounded in rows and in bytes; the least recently used leave first. For any thread."""

    def __init__(self, most_rows: int = MOST_ROWS, most_bytes: int = MOST_BYTES) -> None:
        self.most_rows, self.most_bytes, self.bytes = most_rows, most_bytes, 0
        self._rows: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def known(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """The rows of those texts that are here."""
        with self._lock:
            found = {text: self._rows[text] for text in texts if text in self._rows}
            for text in found:
                self._rows.move_to_end(text)
        return found

    def keep(self, rows: Mapping[str, Tensor]) -> None:
        """Takes rows in."""
        with self._lock:
            for text, row in rows.items():
                self.bytes += _size(text, row) if text not in self._rows else 0
                self._rows[text] = row.clone()  # not the batch that it is a view of
                self._rows.move_to_end(text)
            while len(self._rows) > self.most_rows or self.bytes > self.most_bytes:
                self.bytes -= _size(*self._rows.popitem(last=False))


def _size(text: str, row: Tensor) -> int:
    return row.numel() * row.element_size() + len(text.encode())
