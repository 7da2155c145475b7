"""What Triton takes and this server refuses, as both of its clients ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Asked = tuple[list[Any], list[Any] | None, str]


def not_honoured(triton: Any, tensor: Callable[[str, Sequence[str]], Any], texts: Sequence[str]) -> Iterator[Asked]:
    """Inputs, outputs, and what the refusal names; ``triton`` is the client's module."""
    classes, region = triton.InferRequestedOutput("scores", class_count=1), triton.InferRequestedOutput("scores")
    region.set_shared_memory("region", 12)
    given = triton.InferInput("text", [1], "BYTES")
    given.set_shared_memory("region", 12)
    yield [tensor("text", texts)], [classes], "output 'scores': parameter 'classification'"
    yield [tensor("text", texts)], [region], "output 'scores': parameter 'shared_memory_region'"
    for inputs in ([given], [given, tensor("text_pair", ["a"])]):
        yield inputs, None, "input 'text': parameter 'shared_memory_region'"
