"""How much text a request holds, found before anything is tokenised."""

from __future__ import annotations

from typing import Any

from bertology_serve.encoder.pipeline import Request
from bertology_serve.errors import LimitError


def check_items(count: int, most: float) -> None:
    """LimitError for a call of more than ``most`` items; told before anything is made of them."""
    if count > most:
        raise LimitError(f"the call holds {count} items; at most {most} are taken, send several")


def check_size(request: Request, most: int) -> int:
    """The characters of a request's texts; LimitError when one field holds more than ``most`` of them."""
    total = 0
    for name, value in request.record.items():
        size = characters(value)
        if size > most:
            raise LimitError(
                f"{request.where}: field {name[:40]!r} holds {size} characters; at most {most} are taken, "
                "send a shorter text"
            )
        total += size
    return total


def characters(value: Any) -> int:
    """Characters of a text or of a list of texts, an item of the list counting as one at least; 0 for the rest."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(len(item) if isinstance(item, str) and item else 1 for item in value)
    return 0
