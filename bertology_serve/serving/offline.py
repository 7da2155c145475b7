"""Answers JSON lines without a server: each line one item for one delta, one line back for each, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bertology_serve.encoder.pipeline import Job, Pipeline
from bertology_serve.errors import BertologyError, DataError
from bertology_serve.serving.protocol.bodies import decode, encode
from bertology_serve.serving.protocol.native import answer_of, read_request

WINDOW = 8
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Lines:
    """``name`` is how messages call the source. ``logits`` gives every answer its logits; with ``skip_bad`` a line that
    cannot be answered is answered with its ``error``. Batches have up to ``max_tokens``.
    """

    name: str
    logits: bool = False
    skip_bad: bool = False
    max_tokens: int = 2048


def answer_lines(
    pipeline: Pipeline, lines: Iterable[bytes], options: Lines, was_cut: Callable[[], None] = lambda: None
) -> Iterator[bytes]:
    """One JSON line for each line that is not blank, in order; ``was_cut`` is called for each whose text was cut.

    Items are tokenised ahead and brought together by length, a window of batches at a time: equal lengths share their
    attention. Without ``skip_bad`` raises what is wrong with the first bad line, which the message names.
    """
    window: list[Job | dict[str, Any]] = []
    tokens = 0
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(BOM) if number == 1 else line
        if not line or line.isspace():
            continue
        window.append(_prepared(pipeline, line, f"{options.name}:{number}", options))
        tokens += _cost(window[-1])
        if tokens >= WINDOW * options.max_tokens or len(window) >= options.max_tokens:
            yield from _answered(pipeline, window, options, was_cut)
            window, tokens = [], 0
    yield from _answered(pipeline, window, options, was_cut)


def batches(costs: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices cut into batches of up to ``max_tokens``, those of like cost together; what is larger stands alone."""
    found: list[list[int]] = []
    room = 0
    for index in sorted(range(len(costs)), key=costs.__getitem__):
        if not found or costs[index] > room:
            found.append([])
            room = max_tokens
        found[-1].append(index)
        room -= costs[index]
    return found


def _prepared(pipeline: Pipeline, line: bytes, where: str, options: Lines) -> Job | dict[str, Any]:
    """A job; or, with ``skip_bad``, the answer that says what is wrong."""
    value: Any = None
    try:
        value = _decoded(line, where)
        if options.logits and isinstance(value, dict):
            value = value | {"logits": True}
        return pipeline.prepare(read_request(value, where))
    except BertologyError as problem:
        message = str(problem) if str(problem).startswith(where) else f"{where}: {problem}"
        if not options.skip_bad:
            raise DataError(f"{message} (--skip-bad goes on)") from None
        known = value if isinstance(value, Mapping) else {}
        return {name: known[name] for name in ("id", "delta") if name in known} | {"error": message}


def _decoded(line: bytes, where: str) -> Any:
    try:
        return decode(line)
    except DataError as problem:
        raise DataError(f"{where}: {str(problem).replace('the body', 'the line')}") from None


def _answered(
    pipeline: Pipeline, window: Sequence[Job | dict[str, Any]], options: Lines, was_cut: Callable[[], None]
) -> Iterator[bytes]:
    answers: list[Mapping[str, Any]] = [{} if isinstance(item, Job) else item for item in window]
    jobs = {index: item for index, item in enumerate(window) if isinstance(item, Job)}
    places = list(jobs)
    for batch in batches([jobs[place].cost for place in places], options.max_tokens):
        chosen = [places[index] for index in batch]
        for place, prediction in zip(chosen, pipeline.run([jobs[place] for place in chosen]), strict=True):
            answers[place] = answer_of(jobs[place].request, prediction)
            if prediction.truncated:
                was_cut()
    for answer in answers:
        yield encode(answer) + b"\n"


def _cost(item: Job | dict[str, Any]) -> int:
    return item.cost if isinstance(item, Job) else 0
