"""ONNX Runtime as an engine: packed batches of many deltas (``OnnxEngine``), and exports of one (``OnnxModel``)."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bertology_serve.deltas.delta import BaseRef, Delta, bare
from bertology_serve.deltas.format import LATER
from bertology_serve.deltas.safe_io import build
from bertology_serve.encoder.bank import BankEntry, DeltaBank
from bertology_serve.encoder.batch import Fork, PackedBatch
from bertology_serve.encoder.encoder import Encoder, weights_hash
from bertology_serve.encoder.loading import load_tokenizer
from bertology_serve.errors import BertologyError, FormatError, NotFound, Unsupported
from bertology_serve.export.emitter.delta_inputs import BELOW, Feed, texts
from bertology_serve.export.export_directory import OF_THIS_MACHINE, TASK_OPTIONS, ZERO_SHOT_OPTIONS, save
from bertology_serve.export.export_inputs import ExportInputs, calibration, column_scales
from bertology_serve.export.export_spec import MODEL, ON_CPU, PORTABLE, MultiPrecision, Precision
from bertology_serve.export.samples import Case
from bertology_serve.export.session import Session, kept_session
from bertology_serve.files import JsonObject
from bertology_serve.tasks.spec import Encoding, TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)
INSTEAD = "take --engine torch"
MOST_FORKS = 2
"""Layers that graphs are kept for which end, and begin, there: together they hold the weights once more."""
MOST_KINDS, OFTEN, PAUSE = 2, 50, 60.0
"""Kinds of batches that graphs are kept for, which hold the weights once more each; how often one must come, and the
seconds until one may take another's place: kinds that come by turns do not keep the processor busy."""
Kind = frozenset[str]
Asked = TypeVar("Asked", int, Kind)


class OnnxEngine:
    """``run`` gives the rows that ``Encoder.run`` gives, from the same batches and the same bank.

    The graph is made once, of the encoder alone; deltas are its inputs and come and go in the bank. It holds a copy of
    the encoder's weights of its own. Batches with deltas that the graph has no place for, factors on what several
    linears read, are run by torch. Raises Unsupported for an encoder that it cannot take, or without ONNX Runtime.

    That graph decides by the batch what there is to do, some hundred times. For the kinds of deltas that come most,
    graphs are made that know it, and take half of the time for a short text: on a thread, for ``MOST_KINDS`` at most.

    For batches whose sequences fork, two graphs are made, of the layers below and above: on a thread, when the first
    comes (until then each sequence runs on its own rows), and for ``MOST_FORKS`` layers at most.
    """

    def __init__(self, encoder: Encoder, precision: MultiPrecision = "fp32", opset: int | None = None) -> None:
        self.encoder, self.export_inputs, self.precision = encoder, bare_inputs(encoder), precision
        self._packs, self._opset = encoder.prepacked, opset or PORTABLE
        self._feed, self._hidden = Feed(encoder.anatomy), encoder.anatomy.hidden
        self._session = self._made(0, encoder.depth)
        self._forks: dict[int, tuple[Session, Session]] = {}
        self._kinds: dict[Kind, Session] = {}
        self._seen: Counter[Kind] = Counter()
        self._changed = -PAUSE
        self._asked: set[int | Kind] = set()

    def _made(self, first: int, end: int, known: Kind | None = None) -> Session:
        """The graph of some layers, for batches of a kind that is ``known`` or for all."""

        def make(path: Path) -> None:
            from bertology_serve.export.emitter.emit import emit_hidden

            check_emitted(self.export_inputs)
            inputs = replace(self.export_inputs, columns=self._columns)
            graph = emit_hidden(inputs, self._opset, self.precision, first, end, known)
            save(graph, path, external_over=0)

        own: JsonObject = {"precision": self.precision, "opset": self._opset, "first": first, "end": end}
        own |= {} if known is None else {"known": sorted(known)}
        return kept_session(self._made_of | own, make)

    @cached_property
    def _made_of(self) -> JsonObject:
        """All that its graphs follow from, but for precision, opset and layers."""
        encoder, config = self.encoder, self.encoder.config.to_dict()
        return {
            "weights": weights_hash(self.export_inputs.state),
            "config": {key: value for key, value in config.items() if key not in OF_THIS_MACHINE},
            "anatomy": repr(encoder.anatomy),
            "calibrated on": calibration(encoder).ids.tolist() if self.precision in ON_CPU else [],
        }

    @cached_property
    def _columns(self) -> dict[str, Tensor]:
        """See ``ExportInputs.columns``."""
        return column_scales(self.encoder, self.export_inputs.state) if self.precision in ON_CPU else {}

    def prepare_fork(self, layer: int) -> None:
        """Makes the graphs for sequences that fork before a layer, unless they are there. Takes seconds."""
        self._asked.add(layer)
        if layer not in self._forks:
            self._forks[layer] = self._made(0, layer), self._made(layer, self.encoder.depth)

    def prepare_kind(self, kind: Kind) -> None:
        """Makes the graph for batches of a kind (``Feed.kind``), unless it is there. Takes a second.

        Where there is no room, that of the kind that came least leaves.
        """
        self._asked.add(kind)
        if kind not in self._kinds:
            made = self._made(0, self.encoder.depth, kind)
            kept = sorted(self._kinds, key=lambda one: -self._seen[one])[: MOST_KINDS - 1]
            self._kinds = {one: self._kinds[one] for one in kept} | {kind: made}
            self._asked = {one for one in self._asked if isinstance(one, int)} | self._kinds.keys()
            self._seen.clear()
            self._changed = time.monotonic()

    def prepare_for(self, entries: Iterable[BankEntry], wait: bool = True) -> None:
        """The same for the kind that most of these deltas are of, each by itself; on a thread, unless to ``wait``."""
        kinds = Counter(self._feed.kind([entry]) for entry in entries if self.takes(entry))
        for kind, _ in kinds.most_common(1):
            if wait:
                self.prepare_kind(kind)
            else:
                self._ask(kind, self.prepare_kind)

    @property
    def name(self) -> str:
        """For people: the runtime, its version, and the precision."""
        return f"{self._session.runtime}, {self.precision}"

    def takes(self, entry: BankEntry) -> bool:
        """Whether the graph has a place for all that a delta changes."""
        return self._feed.takes([entry])

    def run(self, batch: PackedBatch, pools: DeltaBank) -> Tensor:
        """The hidden states [T, H], float32, of every row of a packed batch (with forks: of ``batch.last``); sequences
        of like length run together.
        """
        if not self._feed.takes(batch.last.entries):
            self.encoder.prepack(self._packs)
            return self.encoder.run(batch, pools)
        stages = [batch, *(fork.batch for fork in batch.forks)]
        for number in self._most_first(batch.forks, stages):
            fork = batch.forks[number]
            if fork.layer in self._forks:
                lower, upper = self._forks[fork.layer]
                rows = fork.rows
                for later in batch.forks[number + 1 :]:
                    rows = rows[later.rows]
                below = self._rows(stages[number], pools, lower)[rows]
                return self._rows(batch.last, pools, upper, below.numpy())
            self._ask_fork(fork.layer)
        return self._rows(batch.last, pools)

    @staticmethod
    def _most_first(forks: Sequence[Fork], stages: Sequence[PackedBatch]) -> list[int]:
        """The numbers of forks, first those that spare most rows."""
        spared = [(stages[-1].rows - stages[i].rows) * fork.layer for i, fork in enumerate(forks)]
        return sorted(range(len(forks)), key=lambda i: -spared[i])

    def _ask_fork(self, layer: int) -> None:
        """Has the graphs for a fork made, where there is room for them."""
        if layer not in self._asked and sum(isinstance(one, int) for one in self._asked) < MOST_FORKS:
            self._ask(layer, self.prepare_fork)

    def _ask(self, what: Asked, prepare: Callable[[Asked], None]) -> None:
        """Has graphs made on a thread, once. Python waits for it at the end: a daemon's C++ would abort the process."""
        self._asked.add(what)

        def prepared() -> None:
            try:
                prepare(what)
            except Exception:  # batches run without them
                log.exception("no graphs for %s", what)

        threading.Thread(target=prepared, name="onnx-graphs").start()

    def _session_for(self, entries: Sequence[BankEntry]) -> Session:
        """The graph that knows this kind of batch, or else the one for all."""
        kind = self._feed.kind({entry.key: entry for entry in entries}.values())
        self._seen[kind] += 1
        session = self._kinds.get(kind)
        if session is None and kind not in self._asked and self._seen[kind] >= OFTEN:
            least = min((self._seen[one] for one in self._kinds), default=0)
            replaces = self._seen[kind] > 2 * least and time.monotonic() - self._changed >= PAUSE
            if len(self._kinds) < MOST_KINDS or replaces:
                self._ask(kind, self.prepare_kind)
        return session or self._session

    def _rows(
        self,
        batch: PackedBatch,
        pools: DeltaBank,
        session: Session | None = None,
        below: NDArray[np.float32] | None = None,
    ) -> Tensor:
        """The rows [T, H] that a graph makes of a batch; ``below`` [T, H] is what one of upper layers begins with."""
        groups = buckets(batch.lengths, self._hidden)
        parts, places = [], []
        for group in groups:
            entries = [batch.entries[i] for i in group]
            graph = session or self._session_for(entries)
            feeds = self._feed.stacks(pools, graph.inputs) | self._feed.tables(entries)
            feeds |= texts(batch, group, self.export_inputs.inputs)
            starts, lengths = np.array(batch.starts)[group], np.array(batch.lengths)[group]
            if below is not None or len(groups) > 1:
                places.append(np.repeat(starts - (lengths.cumsum() - lengths), lengths) + np.arange(lengths.sum()))
            if below is not None:
                feeds[BELOW] = below[places[-1]]
            parts.append(torch.from_numpy(graph.run(feeds))[: int(lengths.sum())])
        if len(parts) == 1:
            return parts[0]
        hidden = torch.empty(batch.rows, self._hidden)
        for place, part in zip(places, parts, strict=True):
            hidden.index_copy_(0, torch.from_numpy(place), part)
        return hidden


def check_emitted(export_inputs: ExportInputs, instead: str = INSTEAD) -> None:
    """Raises Unsupported, saying what to do ``instead``, where there is no graph for many deltas of an encoder."""
    from bertology_serve.export.emitter.emit import obstacle  # with onnx_ir half a second of imports

    if found := obstacle(export_inputs, many=True):
        raise _no_graph(found, instead)


def _no_graph(why: str, instead: str) -> Unsupported:
    return Unsupported(f"there is no graph for many deltas of this encoder: {why}; {instead}")


def bare_inputs(encoder: Encoder, precision: Precision = "fp32", instead: str = INSTEAD) -> ExportInputs:
    """The encoder without a delta, as the graph is made of it; Unsupported, saying what to do ``instead``."""
    if encoder.device.type != "cpu" or encoder.dtype != torch.float32:
        raise Unsupported(
            f"the graph for many deltas is made of float32 encoders on the CPU, this one is {encoder.dtype} on "
            f"{encoder.device}; {instead}"
        )
    if not encoder.packs:
        raise _no_graph(f"{encoder.anatomy.family} is padded", instead)
    return ExportInputs.of(encoder, bare("base", encoder.ref, encoder.base_task), False, precision)


FIXED = 60
"""What a run of the graph costs besides its rows, for each unit of the encoder's width, in places of the grid [R, R].

A run reads all weights once and starts some hundred nodes.
"""


def buckets(lengths: Sequence[int], hidden: int, fixed: int = FIXED) -> list[list[int]]:
    """Indices of sequences, those of a bucket in their order, so cut that ``Σ (count · longest² + fixed · hidden)`` is
    smallest (by dynamic programming over the distinct lengths)."""
    if len(lengths) == 1:
        return [[0]]
    sizes, counts = np.unique(np.asarray(lengths), return_counts=True)
    if counts.sum() * int(sizes[-1]) ** 2 - (counts * sizes**2).sum() <= fixed * hidden:
        return [list(range(len(lengths)))]
    edges = _edges(sizes, np.concatenate([[0], np.cumsum(counts)]), fixed * hidden)
    number = np.searchsorted(edges, np.asarray(lengths))
    return [np.flatnonzero(number == bucket).tolist() for bucket in range(len(edges))]


def _edges(sizes: np.ndarray, before: np.ndarray, price: int) -> list[int]:
    """The longest length of each bucket, rising; ``before[i]`` sequences are shorter than ``sizes[i]``."""
    best, cut = np.zeros(len(sizes) + 1), np.zeros(len(sizes) + 1, int)
    for end in range(1, len(sizes) + 1):
        costs = best[:end] + (before[end] - before[:end]) * float(sizes[end - 1]) ** 2 + price
        cut[end] = int(costs.argmin())
        best[end] = costs[cut[end]]
    edges, end = [], len(sizes)
    while end:
        edges.append(int(sizes[end - 1]))
        end = cut[end]
    return edges[::-1]


FACTS = "bertology_serve"


class OnnxModel:
    """One export: ``delta`` says name, version, task and base, and holds no tensors."""

    def __init__(self, delta: Delta, session: Session, tokenizer: PreTrainedTokenizerBase, hidden: int) -> None:
        self.delta, self.tokenizer, self._session, self._hidden = delta, tokenizer, session, hidden

    @classmethod
    def open(cls, directory: Path) -> OnnxModel:
        """Reads a directory in the layouts ``hf`` and ``flat``.

        Raises FormatError for what is no such export, VerificationError where ONNX Runtime cannot load the file,
        Unsupported without ONNX Runtime.
        """
        config, model = _config(directory), _file(directory)
        try:
            delta, hidden = _delta(config[FACTS]), int(config.get("hidden_size") or config["dim"])
        except (KeyError, TypeError, ValueError, BertologyError) as problem:
            raise FormatError(f"{directory}: no export of a single delta ({problem}); export one by --merge") from None
        return cls(delta, Session(model), load_tokenizer(str(directory)), hidden)

    def outputs(self, encodings: Sequence[Encoding]) -> list[Tensor]:
        """[C], for tasks that answer for every token [len, C], for embeddings [H], of unit length where exported so.

        Sequences of like length run together.
        """
        pad, found = self.tokenizer.pad_token_id or 0, dict[int, Tensor]()
        for group in buckets([len(one) for one in encodings], self._hidden):
            chosen = tuple(encodings[i] for i in group)
            rows = self._session.run(Case(chosen, max(map(len, chosen)), left=False).arrays(pad))
            for i, row in zip(group, torch.from_numpy(rows), strict=True):
                found[i] = row[: len(encodings[i])] if self.delta.task.per_token else row
        return [found[i] for i in range(len(encodings))]


def exports(root: Path, some: bool = True) -> list[Path]:
    """A directory that is an export itself, or else those in it; NotFound where there is none, unless ``some`` need not
    be.
    """
    below = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    found = [root] if _holds_model(root) else [path for path in below if _holds_model(path)]
    if some and not found:
        raise NotFound(f"no export in {root}; expected onnx/model.onnx or NAME/onnx/model.onnx below it")
    return found


_LAYOUTS = (MODEL["hf"], MODEL["flat"])


def _holds_model(directory: Path) -> bool:
    return any((directory / model).is_file() for model in _LAYOUTS)


def _file(directory: Path) -> Path:
    return next((directory / model for model in _LAYOUTS if (directory / model).is_file()), directory / _LAYOUTS[0])


def _config(directory: Path) -> JsonObject:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise FormatError(f"{directory} is no export: config.json cannot be read ({problem})") from None
    if not isinstance(config, dict) or not isinstance(config.get(FACTS), dict):
        raise FormatError(f"{directory} was not exported by bertology-serve, which says of its task in config.json")
    return config


def _delta(facts: Mapping[str, str]) -> Delta:
    """What the metadata tell of the delta that was exported."""
    lacking = {name: getattr(TaskSpec, name) for name in ("pairs", *LATER)}  # in older exports
    options = lacking | json.loads(facts["task_options"])
    told = {"kind": facts["task"], "labels": json.loads(facts["labels"]), "pooling": facts["pooling"]}
    told |= {"max_length": int(facts["max_length"])}
    told |= {name: options[name] for name in TASK_OPTIONS + ZERO_SHOT_OPTIONS}
    task = build(TaskSpec, told, "the task")
    base = BaseRef(facts["base_name"], facts["base_sha256"], facts["base_family"])
    return Delta(facts["name"], base, task, version=facts["delta_version"] or facts["delta_sha256"][:12])
