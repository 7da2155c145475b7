"""Answers JSON lines without a server, in order; the output file appears whole or not at all."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import math
import os
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import msgspec

from bertology_serve.data.formats import bounded_lines, read_jsonl
from bertology_serve.data.records import READERS
from bertology_serve.encoder.delta_set import DeltaSet, Job, Request
from bertology_serve.errors import BertologyError, Crashed, DataError, NotFound
from bertology_serve.files import JsonMapping, JsonObject, flush, replacing
from bertology_serve.serving.protocol.json_codec import decode, encode
from bertology_serve.serving.protocol.native import answer_of, as_one, asks_several, read_item
from bertology_serve.tasks.spec import TOKEN_CLASSIFICATION

WINDOW = 8  # batches whose items are sorted by length together
BYTES = 4  # of a line for a token of a window, about: windows are the same whoever cuts them, without a tokenizer
KEEP_SECONDS = 5.0  # between two notes of how far a run is
BOM = b"\xef\xbb\xbf"
CUT = b'"truncated":true'


Running = tuple[list[int], Future[list[JsonObject]]]
"""The places of a batch's jobs among those of their window, and their answers."""


class Asked(NamedTuple):
    """What one line asks: a delta, or several whose answers stand together."""

    jobs: list[Job]
    several: bool


class Line(NamedTuple):
    """One line that is to be answered, and where it stands: ``FILE:NUMBER``."""

    where: str
    content: bytes


@dataclass(frozen=True)
class PredictOptions:
    """``logits`` gives every answer its logits; with ``skip_bad`` a line that cannot be answered is answered with its
    ``error``. Batches have up to ``max_tokens``. ``redaction`` holds the fields that lines for deltas of token
    classification get where they lack them.
    """

    logits: bool = False
    skip_bad: bool = False
    max_tokens: int = 2048
    redaction: JsonMapping = field(default_factory=dict)


def answer_lines(
    pipeline: DeltaSet, lines: Iterable[Line], options: PredictOptions
) -> Iterator[tuple[Sequence[Line], list[bytes]]]:
    """Lines and one JSON line for each, in order, a window at a time.

    A window is tokenised while the one before it runs; its items are brought together by length, since equal lengths
    share their attention. As many batches run at once as the pipeline can. Without ``skip_bad`` raises what is wrong
    with the first bad line, which the message names. Raises Crashed for a batch that two executors died of.
    """
    ahead: deque[tuple[list[Line], list[Asked | JsonObject], list[Running]]] = deque()
    pool = ThreadPoolExecutor(pipeline.parallel, "predict")
    try:
        for window in _windows(lines, options.max_tokens):
            items = [_prepared(pipeline, line, options) for line in window]
            jobs = [job for item in items if isinstance(item, Asked) for job in item.jobs]
            running = []
            for batch in batches([job.cost for job in jobs], options.max_tokens):
                running.append((batch, pool.submit(_run, pipeline, [jobs[index] for index in batch])))
            ahead.append((window, items, running))
            if len(ahead) > 1:
                yield _answered(*ahead.popleft())
        while ahead:
            yield _answered(*ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _windows(lines: Iterable[Line], max_tokens: int) -> Iterator[list[Line]]:
    window, size = list[Line](), 0
    for line in lines:
        window.append(line)
        size += len(line.content)
        if size >= WINDOW * BYTES * max_tokens or len(window) >= max_tokens:
            yield window
            window, size = [], 0
    if window:
        yield window


def _run(pipeline: DeltaSet, jobs: Sequence[Job]) -> list[JsonObject]:
    try:
        predictions = pipeline.run(jobs)
    except Crashed:  # the next executor is there in a moment
        predictions = pipeline.run(jobs)
    return [answer_of(job.request, prediction) for job, prediction in zip(jobs, predictions, strict=True)]


def _answered(
    window: list[Line], items: Sequence[Asked | JsonObject], running: Sequence[Running]
) -> tuple[list[Line], list[bytes]]:
    ran = {place: answer for places, batch in running for place, answer in zip(places, batch.result(), strict=True)}
    answers, lines = (ran[place] for place in range(len(ran))), list[bytes]()
    for item in items:
        if isinstance(item, Asked):
            own = [next(answers) for _ in item.jobs]
            item = as_one([job.request.delta for job in item.jobs], own) if item.several else own[0]
        lines.append(encode(item) + b"\n")
    return window, lines


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


def _prepared(pipeline: DeltaSet, line: Line, options: PredictOptions) -> Asked | JsonObject:
    """What a line asks; or, with ``skip_bad``, the answer that says what is wrong."""
    value: Any = None
    where = line.where
    try:
        value = _decoded(line.content, where)
        if options.logits and isinstance(value, dict):
            value = value | {"logits": True}
        requests = read_item(value, where, math.inf, pipeline.named)
        if options.redaction:
            requests = [_redacted(pipeline, request, options.redaction) for request in requests]
        return Asked([pipeline.prepare(request) for request in requests], asks_several(value))
    except BertologyError as problem:
        message = str(problem) if str(problem).startswith(where) else f"{where}: {problem}"
        if not options.skip_bad:
            raise DataError(f"{message} (--skip-bad goes on)") from None
        known = value if isinstance(value, Mapping) else {}
        return {name: known[name] for name in ("id", "delta", "deltas") if name in known} | {"error": message}


def _redacted(pipeline: DeltaSet, request: Request, fields: JsonMapping) -> Request:
    finds_spans = pipeline.named(request.delta).task.kind == TOKEN_CLASSIFICATION
    return replace(request, record={**fields, **request.record}) if finds_spans else request


def _decoded(line: bytes, where: str) -> Any:
    try:
        return decode(line)
    except DataError as problem:
        raise DataError(f"{where}: {str(problem).replace('the body', 'the line')}") from None


STANDARD = "-"


def read_lines(names: Iterable[str]) -> Iterator[Line]:
    """The lines of files (.gz too) or of standard input, one file after the other, without blank ones.

    Raises what ``reading`` does, and DataError for endless lines.
    """
    for name in names:
        called = "stdin" if name == STANDARD else name
        with reading(name) as file:
            for number, line in bounded_lines(file, called):
                line = line.removeprefix(BOM) if number == 1 else line
                if line and not line.isspace():
                    yield Line(f"{called}:{number}", line)


@contextmanager
def reading(name: str) -> Iterator[IO[bytes]]:
    """The bytes of a file (.gz too) or of standard input; NotFound, DataError where they cannot be read."""
    if name == STANDARD:
        yield sys.stdin.buffer
        return
    _check_lines(name)
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


CONVERT = (
    "import json; from bertology_serve.data.records import read_records as read; "
    "[print(json.dumps({{**row, 'delta': 'NAME'}})) for row, _ in read({name!r})]"
)


def _check_lines(name: str) -> None:
    """Raises DataError for a file whose name says that it holds no JSON lines, and tells how to make them."""
    kind = Path(name.removesuffix(".gz")).suffix.lower()
    if READERS.get(kind, read_jsonl) is not read_jsonl:
        raise DataError(
            f"{name}: a {kind} file; expected JSON lines, each with its delta and the fields of its task, which this "
            f'prints: python -c "{CONVERT.format(name=name)}"'
        )


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


class RunProgress(msgspec.Struct):
    """How far a run is: what it follows from, the lines that are answered, their SHA-256, how many of their texts were
    cut, the bytes of the answers. ``prepack``: how it laid out the weights, which a timing decides.
    """

    key: str = ""
    prepack: bool | None = None
    lines: int = 0
    digest: str = ""
    cut: int = 0
    bytes: int = 0


class AnswerFile:
    """Where the answers of a run go. ``progress`` is how far it is, or how far one was that ended before.

    A file's answers stand in ``.NAME.partial`` beside it, which takes its name when all are there;
    ``.NAME.partial.json`` says how far they are. Standard output and devices get them at once and are not gone on with.
    """

    def __init__(self, name: str) -> None:
        self._name, self._path = name, Path(name).resolve()  # through links, so that a link stays one
        self._own = self._path.with_name(f".{self._path.name}.partial")
        self._note = self._own.with_name(f"{self._own.name}.json")
        self._whole = name == STANDARD or (self._path.exists() and not self._path.is_file())
        self._file: IO[bytes] = sys.stdout.buffer
        self._digest, self._noted, self.progress = hashlib.sha256(), 0.0, RunProgress()
        with suppress(OSError, msgspec.DecodeError):
            begun = msgspec.json.decode(self._note.read_bytes(), type=RunProgress)
            if not self._whole and begun.bytes <= self._own.stat().st_size:
                self.progress = begun

    @contextmanager
    def opened(self, key: str, prepack: bool | None) -> Iterator[None]:
        """Takes the answers of the run that follows from ``key``; what is there of another one is not gone on with, and
        with an empty one nobody goes on with this one.

        DataError where there is no such directory, where it cannot be written to, or another run writes it.
        """
        if self.progress.key != key:
            self.progress = RunProgress(key, prepack)
        if self._whole:
            with writing(self._name) as self._file:
                yield
            return
        try:
            self._file = self._own.open("ab")
        except OSError as problem:
            raise DataError(f"cannot write {self._name}: {problem.strerror}; choose another place") from None
        with self._file as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.stat(self._own)
            except (BlockingIOError, FileNotFoundError):
                raise DataError(f"another run writes {self._name}; wait for it, or choose another place") from None
            try:
                self._begin()
                yield
                file.flush()
                flush(self._own)
                os.replace(self._own, self._path)
                self._note.unlink(missing_ok=True)
            finally:
                if not self._note.exists():  # what there is took seconds
                    self._own.unlink(missing_ok=True)

    def rest(self, names: Sequence[str]) -> Iterator[Line]:
        """The lines of these files that are not answered yet: all of them, unless the first are those that were."""
        lines = read_lines(names)
        if self.progress.lines:
            self._digested(islice(lines, self.progress.lines))
            if self._digest.hexdigest() != self.progress.digest:
                self.progress, self._digest = RunProgress(self.progress.key, self.progress.prepack), hashlib.sha256()
                self._begin()
                return read_lines(names)
        return lines

    def _begin(self) -> None:
        """Leaves of what is there the answers that this run goes on with. A note of others goes before they do: it
        would say that the answers of this run are those.
        """
        if not self.progress.lines:
            self._note.unlink(missing_ok=True)
        self._file.truncate(self.progress.bytes)
        self._noted = time.monotonic()

    def write(self, lines: Sequence[Line], answers: Sequence[bytes]) -> None:
        """The answers to the next lines. Every few seconds it is noted how far the run is."""
        progress = self.progress
        self._file.writelines(answers)
        self._digested(lines)
        progress.lines += len(lines)
        progress.cut += sum(CUT in answer for answer in answers)
        progress.bytes += sum(map(len, answers))
        if progress.key and not self._whole and time.monotonic() - self._noted >= KEEP_SECONDS:
            self._file.flush()
            flush(self._own)  # before the note, which must not be ahead of it
            progress.digest = self._digest.hexdigest()
            with replacing(self._note) as path:
                path.write_bytes(msgspec.json.encode(progress))
            self._noted = time.monotonic()

    def _digested(self, lines: Iterable[Line]) -> None:
        for where, content in lines:
            self._digest.update(b"%b %b" % (os.fsencode(where), content))
