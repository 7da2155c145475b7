"""The deltas that answer, by name and version: everything between a request and its prediction but the computing."""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from bertology_serve.deltas.delta import BaseRef, Delta, bare
from bertology_serve.deltas.layout import check_base
from bertology_serve.encoder.bank import BARE, BankEntry
from bertology_serve.encoder.encoder import weights_hash
from bertology_serve.errors import BertologyError, NotFound, SpecError, Unsupported, about, nearest
from bertology_serve.files import JsonObject
from bertology_serve.tasks.base import Example, Task
from bertology_serve.tasks.heads import Head, aggregate
from bertology_serve.tasks.redaction import REDACTION_FIELDS, Redaction, Redactor
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import EMBEDDING, MULTI_VECTOR, Encoding, TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE = "base"


@dataclass(frozen=True)
class Request:
    """One record for one delta; ``id`` is the caller's own, ``logits`` asks for the head's raw output too, ``rows`` of
    an embedding for every token's last hidden row, as a multi-vector delta would answer.

    With ``version`` no other version of the delta may answer.
    """

    delta: str
    record: Mapping[str, Any]
    id: str = ""
    logits: bool = False
    where: str = "request"
    version: str = ""
    rows: bool = False


@dataclass(frozen=True)
class Prediction:
    """One answer, with the delta and version that gave it. ``answer`` holds the task's fields.

    ``tokens_read`` are those of all its sequences, special tokens included (windows overlap); ``tokens_given`` those
    that the record had, which are more where it was cut to the delta's maximum length. ``windows`` are those that it
    was read in.
    """

    delta: str
    version: str
    task: str
    answer: Mapping[str, Any]
    id: str = ""
    tokens_read: int = 0
    tokens_given: int = 0
    windows: int = 1

    @cached_property
    def truncated(self) -> bool:
        """Whether a part of the text was not read."""
        return self.tokens_given > self.tokens_read

    def as_dict(self) -> JsonObject:
        """Flat, ready for JSON. What was cut says so, ``truncated`` and both counts of tokens, and what had windows."""
        own = {"delta": self.delta, "version": self.version, "task": self.task, **self.answer}
        if self.truncated:
            own |= {"truncated": True, "tokens_read": self.tokens_read, "tokens_given": self.tokens_given}
        if self.windows > 1:
            own["windows"] = self.windows
        return {"id": self.id, **own} if self.id else own


class TaskModel(Protocol):
    """A whole model of one task, with an encoder and a tokenizer of its own."""

    tokenizer: PreTrainedTokenizerBase

    def outputs(self, encodings: Sequence[Encoding]) -> list[Tensor]:
        """[C], [len, C] or [H] of every sequence, float32 on CPU."""
        ...


MOST_ROWS, MOST_BYTES = 4096, 16 * 2**20


class RowCache:
    """Rows [H] of texts that come again, such as labels: the most recent ones of one version of a delta.

    Bounded in rows and in bytes; the least recently used leave first. For any thread.
    """

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


class LoadedDelta:
    """A delta that can answer: its task, its head, and its rows in the bank, which live as long as it does.

    Where it has a ``model``, that one answers, and head and entry are bare. ``rows`` are those of labels.
    """

    def __init__(self, delta: Delta, task: Task, head: Head, entry: BankEntry, model: TaskModel | None = None) -> None:
        self.delta, self.task, self.head, self.entry, self.model = delta, task, head, entry, model
        self.prompt_length, self.rows = entry.prompt_length, RowCache()
        self.whole: LoadedDelta | None = None

    def every_token(self, hidden: int, task: Task | None = None) -> LoadedDelta:
        """The same delta, answering with the last hidden row [hidden] of every token, or with what a ``task`` makes of
        them. ``whole`` is then this one, which keeps its rows in the bank. Raises Unsupported for a whole model.
        """
        if self.model is not None:
            raise Unsupported(f"delta {self.delta.name!r} is a whole model, which gives no rows of tokens")
        own = self.delta.task
        spec = TaskSpec(
            MULTI_VECTOR, max_length=own.max_length, normalize=False, width=hidden, skip_punctuation=False,
            prompts=own.prompts,
        )  # fmt: skip
        found = LoadedDelta(replace(self.delta, task=spec), task or task_for(spec), Head(()), self.entry)
        found.whole = self
        return found


@dataclass(eq=False)
class Job:
    """A request for a loaded delta, which it holds on to. ``DeltaSet.tokenise`` adds the rest.

    ``cost`` is in rows, as if it were alone, and ``charged`` what is left of it where others need the same rows;
    ``squares`` sums the squared lengths of its sequences, which attention costs. ``beside`` are the texts of
    ``Task.beside``: the rows of some are ``known``, the sequences of the others are its last ones.
    """

    request: Request
    ready: LoadedDelta = field(repr=False)
    example: Example = field(init=False, repr=False)
    encodings: Sequence[Encoding] = field(init=False, repr=False)
    redaction: Redaction | None = field(init=False, default=None, repr=False)
    cost: int = field(init=False, default=0)
    charged: int = field(init=False, default=0)
    squares: int = field(init=False, default=0)
    beside: Sequence[str] = field(init=False, repr=False, default=())
    known: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)

    @property
    def unknown(self) -> list[str]:
        return [text for text in dict.fromkeys(self.beside) if text not in self.known]

    def take(self, encodings: Sequence[Encoding]) -> None:
        lengths = [len(encoding.ids) for encoding in encodings]
        self.encodings = encodings
        self.cost = self.charged = sum(lengths) + len(lengths) * self.ready.prompt_length
        self.squares = sum([length * length for length in lengths])

    def answered(self, outputs: Sequence[Tensor]) -> Prediction:
        delta, windows, new = self.ready.delta, 1, self.unknown
        own = self.encodings[: len(self.encodings) - len(new)]
        if any([encoding.continues for encoding in own]):
            windows = len(own)
            if not delta.task.per_token:
                outputs = aggregate(torch.stack(list(outputs)), self.encodings, delta.task).unbind(0)
        if self.beside:
            rows = self.known | dict(zip(new, outputs[len(outputs) - len(new) :], strict=True))
            self.ready.rows.keep({text: rows[text] for text in new})
            beside = torch.stack([rows[text] for text in self.beside])
            outputs = self.ready.task.compared(outputs[0][None], beside).unbind(0)
        answer = dict(self.ready.task.decode(self.example, self.encodings, outputs))
        if self.redaction is not None:
            answer |= self.redaction.of(self.ready.task.spanned(self.example), answer)
        if self.request.logits:
            logits = [output.tolist() for output in outputs]
            answer["logits"] = logits[0] if len(logits) == 1 else logits
        read, cut = (sum(counts) for counts in zip(*((len(one), one.cut) for one in own), strict=True))
        return Prediction(
            delta.name, delta.version, self.ready.task.kind, answer, self.request.id, read, read + cut, windows
        )


class Ledger:
    """The bytes of every delta that takes room, by key: from before its rows are copied until nothing refers to it.

    ``gone`` are the keys whose rows can be freed. For any thread, and for finalizers: nothing here takes a lock.
    """

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self.gone: deque[str] = deque()

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._bytes))

    @property
    def total(self) -> int:
        return sum(list(self._bytes.values()))

    def enter(self, key: str, size: int) -> None:
        """Counts a delta of ``size`` bytes from now on."""
        self._bytes[key] = size

    def leave(self, key: str) -> None:
        """Counts it no longer, and leaves its rows to be freed."""
        self._bytes.pop(key, None)
        self.gone.append(key)


class Backbone(Protocol):
    """What is known of the encoder wherever it runs. ``packing`` is "packed" or "padded", and why; ``refusal`` says
    why the bare encoder does not answer, if it does not.
    """

    name: str
    refusal: str
    ref: BaseRef
    tokenizer: PreTrainedTokenizerBase
    packing: str

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held by each batch that runs."""
        ...

    @property
    def base_task(self) -> TaskSpec:
        """What the bare encoder answers."""
        ...

    @property
    def hidden(self) -> int:
        """H: the width of its rows."""
        ...

    @property
    def max_tokens(self) -> int:
        """The longest sequence, special tokens included."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        ...

    @property
    def depth(self) -> int:
        """L: its layers."""
        ...

    @property
    def is_pruned(self) -> bool:
        """Whether it was made from a larger one by leaving out heads."""
        ...

    def check_length(self, tokens: int) -> None:
        """Raises LimitError where sequences of that many tokens do not fit."""
        ...


class DeltaSet(ABC):
    """The deltas of one encoder that answer. Subclasses say where their rows lie and what runs the pass.

    ``prepare`` may be called from many threads; ``run``, ``add`` and ``remove`` serialise themselves.
    The name ``base`` is reserved: the bare encoder, which answers embeddings. ``redactor`` is what calls may ask of
    redaction.
    """

    encoder: Backbone

    def __init__(self, encoder: Backbone) -> None:
        self.encoder, self.redactor = encoder, Redactor()
        self._ready: dict[str, LoadedDelta] = {}
        self._beside: dict[tuple[str, str], LoadedDelta] = {}
        self.ledger = Ledger()
        self._keys = itertools.count(1)
        base = bare(BASE, encoder.ref, encoder.base_task)
        self.base = self._ready[BASE] = LoadedDelta(base, task_for(base.task), Head(()), BARE)

    @property
    def deltas(self) -> dict[str, Delta]:
        """The deltas that answer now, by name, the bare base included."""
        return {name: ready.delta for name, ready in list(self._ready.items())}

    @property
    def is_up(self) -> bool:
        """Whether batches can run now."""
        return True

    @property
    def restarts(self) -> int:
        """How often what runs them had to be started again."""
        return 0

    @property
    def parallel(self) -> int:
        """How many batches can run at the same time."""
        return 1

    def reserve(self, delta: Delta) -> str:
        """Counts a delta as resident before it is; the key for ``add``, which counts it no longer where it fails."""
        key = f"{delta.name}#{next(self._keys)}"
        self.ledger.enter(key, self.resident_bytes(delta))
        return key

    def add(self, delta: Delta, beside: bool = False, key: str = "") -> None:
        """Makes a delta resident; one of the same name is replaced, its jobs under way finish on it.

        ``beside`` keeps that one: the new version answers requests that name it, and no others. ``key`` is that of
        ``reserve``, where room was reserved.
        On a pruned encoder the deltas of what it was pruned from are sliced.
        Raises BaseMismatch for a delta of other weights, Unsupported for what this encoder cannot apply, LimitError
        where its sequences do not fit.
        """
        if not isinstance(delta, Delta):
            raise SpecError(f"expected a delta, got {delta!r:.60}; load_delta(path) reads one")
        key = key or self.reserve(delta)
        try:
            ready = self.admit(key, delta)
        except BaseException as problem:
            self.ledger.leave(key)
            if isinstance(problem, BertologyError):
                raise about(problem, f"delta {delta.name!r}") from None
            raise
        weakref.finalize(ready, self.ledger.leave, key)
        if beside:
            self._beside[delta.name, delta.version] = ready
        else:
            self._ready[delta.name] = ready

    @abstractmethod
    def read(self, path: Path, name: str) -> Delta:
        """A delta from its directory, for ``add``; raises what is wrong with it."""

    @abstractmethod
    def resident_bytes(self, delta: Delta) -> int:
        """What a delta that was read takes once it is resident."""

    @abstractmethod
    def admit(self, key: str, delta: Delta) -> LoadedDelta:
        """Copies a delta's rows to where batches run, under a key; no batch waits for more.

        Raises what ``add`` does.
        """

    @abstractmethod
    def free(self, key: str) -> None:
        """Frees the rows under a key; there need not be any. The lock is held."""

    @abstractmethod
    def outputs(self, owned: Sequence[tuple[LoadedDelta, Encoding]]) -> list[Tensor]:
        """Sequences of many deltas in one pass: each one's head output, as ``_forward``. The lock is held."""

    def add_model(self, delta: Delta, model: TaskModel) -> None:
        """Makes a whole model answer under the name of a delta, which says its task; it never shares a pass.

        Raises SpecError where something answers under that name already.
        """
        if delta.name in self._ready:
            raise SpecError(f"{delta.name!r} answers already; export the model under another --name")
        self._ready[delta.name] = LoadedDelta(delta, task_for(delta.task), Head(()), BankEntry(delta.name), model)

    def named(self, name: str) -> Delta:
        """The delta that answers under that name now; raises NotFound."""
        return self._find(name).delta

    def resident(self, name: str, version: str = "") -> Delta | None:
        """The delta that answers under that name now; the one of that version, where one is named."""
        ready = self.loaded(name, version)
        return ready.delta if ready else None

    def loaded(self, name: str, version: str = "") -> LoadedDelta | None:
        """The same with all that it needs to answer, which stays in memory for as long as this is held."""
        ready = self._ready.get(name)
        if ready is not None and version in ("", ready.delta.version):
            return ready
        return self._beside.get((name, version))

    def remove_versions(self, name: str, versions: Iterable[str]) -> None:
        """Takes away versions that stand beside the one that answers; unknown ones are fine."""
        for version in versions:
            self._beside.pop((name, version), None)

    def remove(self, name: str) -> None:
        """Takes a delta away; its rows are freed once the last job under way has finished."""
        if name == BASE:
            raise Unsupported("the bare base cannot be removed")
        if not self.evict(name):
            self._find(name)
        with self.encoder.lock:
            self.free_rows()

    def evict(self, name: str) -> bool:
        """Takes a delta away without waiting for a batch, the next of which frees its rows; whether it was there."""
        return self._ready.pop(name, None) is not None

    def prepare(self, request: Request) -> Job:
        """Checks and tokenises one request. Raises NotFound, DataError; SpecError for what is no request."""
        if not isinstance(request.delta, str) or not isinstance(request.record, Mapping):
            raise SpecError(
                f"a request was made of {request.delta!r:.60} and {request.record!r:.60}; expected a delta's name and "
                "a record, such as {'text': 'I left smiling.'}"
            )
        main = self._find(request.delta)
        ready = self.loaded(request.delta, request.version)
        if ready is None:
            raise NotFound(
                f"delta {request.delta!r} has no version {request.version[:80]!r} here; it answers with "
                f"{main.delta.version!r}"
            )
        job = Job(request, ready)
        self.tokenise(job)
        return job

    def tokenise(self, job: Job) -> None:
        """Checks the record of a job and tokenises it. Raises DataError; LimitError for a text to be redacted that
        would be cut; Unsupported for the bare encoder of a sentence encoder that embeds otherwise than is known here.
        """
        if self.encoder.refusal and job.request.delta == BASE:
            raise Unsupported(f"{job.request.where}: the base answers no embeddings here: {self.encoder.refusal}")
        if job.request.rows and job.ready.whole is None:
            job.ready = job.ready.every_token(self.encoder.hidden)
        request, ready = job.request, job.ready
        if not REDACTION_FIELDS.isdisjoint(request.record):
            job.redaction = self.redactor.asked(request.record, request.where, ready.delta.task)
        job.example = ready.task.example(request.record, request.where, labelled=False)
        if ready.task.kind == EMBEDDING and ready.task.asks_rows(
            job.example, None if ready.model else self.encoder.hidden
        ):
            job.ready = ready if ready.whole else ready.every_token(self.encoder.hidden, ready.task)
        task, tokenizer = ready.task, (ready.model or self.encoder).tokenizer
        job.beside, own = task.beside(job.example), task.encode(job.example, tokenizer)
        if job.beside:
            job.known = ready.rows.known(job.beside)
            own = [*own, *(task.encode_beside(text, tokenizer) for text in job.unknown)]
        job.take(own)
        if job.redaction is not None:
            job.redaction.check(sum(encoding.cut for encoding in job.encodings), request.where)

    def run(self, jobs: Sequence[Job]) -> list[Prediction]:
        """Answers all jobs, of whatever deltas, in one packed batch; in the order given."""
        if not jobs:
            return []
        with self.encoder.lock, torch.inference_mode():
            self.free_rows()
            outputs = self._forward(jobs)
        predictions, at = [], 0
        for job in jobs:
            own = outputs[at : at + len(job.encodings)]
            at += len(job.encodings)
            predictions.append(job.answered(own))
        return predictions

    def answer(self, requests: Iterable[Request], max_tokens: int = 4096) -> list[Prediction]:
        """Answers in order, in batches of up to ``max_tokens`` rows; a longer request gets a batch of its own.

        Raises NotFound for a delta that is not here, DataError for a record that its task cannot read.
        """
        return list(self.stream(requests, max_tokens))

    def stream(self, requests: Iterable[Request], max_tokens: int = 4096) -> Iterator[Prediction]:
        """The same as ``answer``, each answer as soon as its batch has run."""
        waiting: list[Job] = []
        for request in requests:
            job = self.prepare(request)
            if waiting and sum(other.cost for other in waiting) + job.cost > max_tokens:
                yield from self.run(waiting)
                waiting = []
            waiting.append(job)
        yield from self.run(waiting)

    def _forward(self, jobs: Sequence[Job]) -> list[Tensor]:
        """The head's output of every sequence of every job, in order: [C], [len, C] or [H], float32 on CPU."""
        owned = [(job.ready, encoding) for job in jobs for encoding in job.encodings]
        members: dict[int, list[int]] = {}
        for i, (ready, _) in enumerate(owned):
            members.setdefault(id(ready.model), []).append(i)
        outputs: dict[int, Tensor] = {}
        for group in members.values():
            model = owned[group[0]][0].model
            chosen = [owned[i] for i in group]
            found = self.outputs(chosen) if model is None else model.outputs([encoding for _, encoding in chosen])
            outputs |= zip(group, found, strict=True)
        return [outputs[i] for i in range(len(owned))]

    def check(self, delta: Delta) -> None:
        """Raises what ``add`` would for a delta that is not for this encoder; its tensors do not matter."""
        if delta.name == BASE:
            raise Unsupported("the name 'base' is reserved for the bare encoder; rename the delta")
        if not delta.weights:
            check_base(delta, self.encoder.ref)
        elif weights_hash(delta.weights) != self.encoder.ref.sha256:
            raise Unsupported(
                f"delta {delta.name!r} is a whole checkpoint and shares no backbone; "
                "compress it, or export it and serve it with --models"
            )
        self.encoder.check_length(delta.task.max_length)

    def _find(self, name: str) -> LoadedDelta:
        ready = self._ready.get(name)
        if ready is None:
            raise NotFound(f"no delta {name!r}; {nearest(name, self._ready)}")
        return ready

    def free_rows(self) -> None:
        """Frees the rows of deltas that nothing refers to any more. The lock is held."""
        while self.ledger.gone:
            self.free(self.ledger.gone.popleft())
