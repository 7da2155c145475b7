"""Answers JSON lines without a server, in order; the output file appears whole or not at all."""

from __future__ import annotations

import gzip
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from bertology_serve.encoder.pipeline import Job, Pipeline
from bertology_serve.errors import BertologyError, DataError, NotFound
from bertology_serve.files import JsonMapping, JsonObject, replacing
from bertology_serve.serving.protocol.json_codec import decode, encode
from bertology_serve.serving.protocol.native import answer_of, read_request
from bertology_serve.tasks.spec import TOKEN_CLASSIFICATION

WINDOW = 8
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Lines:
    """``name`` is how messages call the source. ``logits`` gives every answer its logits; with ``skip_bad`` a line that
    cannot be answered is answered with its ``error``. Batches have up to ``max_tokens``. ``redaction`` holds the fields
    that lines for deltas of token classification get where they lack them.
    """

    name: str
    logits: bool = False
    skip_bad: bool = False
    max_tokens: int = 2048
    redaction: JsonMapping = field(default_factory=dict)


def answer_lines(
    pipeline: Pipeline, lines: Iterable[bytes], options: Lines, was_cut: Callable[[], None] = lambda: None
) -> Iterator[bytes]:
    """One JSON line for each line that is not blank, in order; ``was_cut`` is called for each whose text was cut.

    Items are tokenised ahead and brought together by length, a window of batches at a time: equal lengths share their
    attention. Without ``skip_bad`` raises what is wrong with the first bad line, which the message names.
    """
    window: list[Job | JsonObject] = []
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


def _prepared(pipeline: Pipeline, line: bytes, where: str, options: Lines) -> Job | JsonObject:
    """A job; or, with ``skip_bad``, the answer that says what is wrong."""
    value: Any = None
    try:
        value = _decoded(line, where)
        if options.logits and isinstance(value, dict):
            value = value | {"logits": True}
        if options.redaction and isinstance(value, dict) and _finds_spans(pipeline, value.get("delta")):
            value = {**options.redaction, **value}
        return pipeline.prepare(read_request(value, where))
    except BertologyError as problem:
        message = str(problem) if str(problem).startswith(where) else f"{where}: {problem}"
        if not options.skip_bad:
            raise DataError(f"{message} (--skip-bad goes on)") from None
        known = value if isinstance(value, Mapping) else {}
        return {name: known[name] for name in ("id", "delta") if name in known} | {"error": message}


def _finds_spans(pipeline: Pipeline, name: object) -> bool:
    delta = pipeline.resident(name) if isinstance(name, str) else None
    return delta is not None and delta.task.kind == TOKEN_CLASSIFICATION


def _decoded(line: bytes, where: str) -> Any:
    try:
        return decode(line)
    except DataError as problem:
        raise DataError(f"{where}: {str(problem).replace('the body', 'the line')}") from None


def _answered(
    pipeline: Pipeline, window: Sequence[Job | JsonObject], options: Lines, was_cut: Callable[[], None]
) -> Iterator[bytes]:
    answers: list[JsonMapping] = [{} if isinstance(item, Job) else item for item in window]
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


def _cost(item: Job | JsonObject) -> int:
    return item.cost if isinstance(item, Job) else 0


STANDARD = "-"


@contextmanager
def reading(name: str) -> Iterator[IO[bytes]]:
    """The bytes of a file (.gz too) or of standard input; NotFound, DataError where they cannot be read."""
    if name == STANDARD:
        yield sys.stdin.buffer
        return
    try:
        opened = cast(IO[bytes], gzip.open(name, "rb")) if name.endswith(".gz") else open(name, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise NotFound(f"no file {name}; expected JSON lines, or - for standard input") from None
    except OSError as problem:
        raise DataError(f"cannot read {name}: {problem.strerror}; expected a file of JSON lines") from None
    with opened:
        try:
            yield opened
        except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
            raise DataError(f"{name}: broken gzip file ({problem}); fetch or compress it again") from None


@contextmanager
def writing(name: str) -> Iterator[IO[bytes]]:
    """A file that takes its name only when everything was written; devices and standard output are written as they are.

    DataError where there is no such directory or it cannot be written to.
    """
    path = Path(name)
    if name == STANDARD:
        try:
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        except BrokenPipeError:  # the reader has seen enough; what is left goes nowhere, at exit too
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if path.exists() and not path.is_file():
        if path.is_dir():
            raise DataError(f"{name} is a directory; expected the name of a file to write")
        with path.open("wb") as device:
            yield device
        return
    with replacing(path.resolve()) as own:  # through links, so that a link stays one
        try:
            file = own.open("xb")
        except OSError as problem:
            raise DataError(f"cannot write {name}: {problem.strerror}; choose another place") from None
        with file:
            yield file
