"""Deltas under training: their parameters, their heads, and the shared forward pass with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.bank import BARE, BankEntry, LiveBank
from bertology_serve.encoder.batch import PackedBatch, read
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import SpecError
from bertology_serve.kinds import kinds
from bertology_serve.kinds.effects import Effects
from bertology_serve.kinds.kinds import Spec
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.heads import aggregate
from bertology_serve.tasks.spec import Encoding, TaskSpec

Around = Callable[[Sequence[Encoding], PackedBatch], AbstractContextManager[None]]


def nested(outer: Around, inner: Around) -> Around:
    """Two contexts as one."""

    @contextmanager
    def both(encodings: Sequence[Encoding], batch: PackedBatch) -> Iterator[None]:
        with outer(encodings, batch), inner(encodings, batch):
            yield

    return both


class TrainableDelta(nn.Module):
    """The trainable tensors of one delta on an encoder that stays frozen, or with ``full`` is trained itself.

    ``trunk_dropout`` says whether the encoder's own dropout is active in training mode; ``around`` makes a context that
    holds while the encoder runs.
    """

    def __init__(
        self, encoder: Encoder, specs: Sequence[Spec], task: TaskSpec, seed: int = 0, full: bool = False
    ) -> None:
        super().__init__()
        encoder.check_length(task.max_length)
        generator = torch.Generator().manual_seed(seed)
        self.encoder, self.specs, self.task, self.full = encoder, tuple(specs), task, full
        self.trunk_dropout = full
        self.around: Around = lambda encodings, batch: nullcontext()
        tensors = kinds.init(specs, encoder.anatomy, generator)
        self._names = {name.replace(".", "-"): name for name in tensors}
        self.tensors = nn.ParameterDict(
            {name.replace(".", "-"): nn.Parameter(t, not kinds.is_frozen(name)) for name, t in tensors.items()}
        )
        dropout = _head_dropout(encoder.config)
        self.head = encoder.head(task, generator, dropout, adopt=full)
        if full:
            encoder.unpack_weights()
            self.model = encoder.model.requires_grad_(True)
        self.to(encoder.device)

    def forward(self, encodings: Sequence[Encoding]) -> Tensor:
        """The head's output for the sequences in the order given, as ``Task.loss`` takes it; float32."""
        hidden, batch = self.hidden(encodings)
        return aggregate(read(hidden, batch, batch.places, self.task, self.head), encodings, self.task)

    def hidden(self, encodings: Sequence[Encoding]) -> tuple[Tensor, PackedBatch]:
        """The encoder's rows [T, H] and the packed batch that they belong to."""
        pools, entry = self.bank()
        batch = self.encoder.pack(encodings, [entry] * len(encodings))
        with self.around(encodings, batch):
            return self.encoder.run(batch, pools), batch

    def bank(self) -> tuple[LiveBank, BankEntry]:
        """The components' rows as they are at this moment, and their place there."""
        pools = LiveBank([("live", self.effects())], self.training)
        return pools, pools.entries["live"] if self.specs else BARE

    def effects(self) -> Effects:
        """What the components do at this moment, differentiable in them."""
        return self.encoder.allowed(kinds.effects(self.specs, self.named_tensors(), self.encoder.anatomy))

    def named_tensors(self) -> dict[str, Tensor]:
        """The components' parameters by the names that the delta saves them under."""
        return {self._names[key]: tensor for key, tensor in self.tensors.items()}

    def train(self, mode: bool = True) -> TrainableDelta:
        """Training mode for the head, and for the encoder's dropout where ``trunk_dropout`` says so."""
        super().train(mode)
        self.encoder.model.train(mode and self.trunk_dropout)
        return self

    def no_decay(self) -> set[str]:
        """Names (as in ``named_parameters``) that weight decay leaves alone: biases, LayerNorms and factors."""
        components = {f"tensors.{key}" for key, name in self._names.items() if not kinds.decays(name)}
        others = {name for name, p in self.named_parameters() if not name.startswith("tensors.") and p.dim() < 2}
        return components | others

    def freeze(
        self, name: str, version: str = "", metrics: Mapping[str, float] | None = None,
        provenance: Mapping[str, object] | None = None,
    ) -> Delta:  # fmt: skip
        """What has been trained so far, as a delta of detached float32 CPU copies."""

        def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in tensors.items()}

        return Delta(
            name=name,
            base=self.encoder.ref,
            task=self.task,
            specs=self.specs,
            tensors=own(self.named_tensors()),
            head=self.head.own_tensors(),
            weights=own(self.encoder.model.state_dict()) if self.full else {},
            version=version,
            metrics=metrics or {},
            provenance=dict(provenance or {}),
            made_for=self.encoder.shape,
        )


def trained(live: TrainableDelta) -> dict[str, nn.Parameter]:
    """The parameters under training by name, in a fixed order."""
    return {name: parameter for name, parameter in live.named_parameters() if parameter.requires_grad}


def _head_dropout(config: object) -> float:
    """The rate that HuggingFace's task models put before their classifier."""
    for field in ("classifier_dropout", "cls_dropout", "seq_classif_dropout", "hidden_dropout_prob", "dropout"):
        rate = getattr(config, field, None)
        if isinstance(rate, float):
            return rate
    return 0.0


@dataclass(frozen=True)
class Share:
    """What one delta has in a pass: ``sequences`` are the places of its ``encodings``, in order, in the batch."""

    live: TrainableDelta
    hidden: Tensor
    batch: PackedBatch
    encodings: Sequence[Encoding]
    sequences: tuple[int, ...]

    def output(self) -> Tensor:
        """The delta's head over its own rows, as ``TrainableDelta`` itself gives it."""
        out = read(self.hidden, self.batch, self.sequences, self.live.task, self.live.head)
        return aggregate(out, self.encodings, self.live.task)


def run_together(parts: Sequence[tuple[TrainableDelta, Sequence[Encoding]]]) -> list[Share]:
    """One pass over the encodings of several live deltas of one encoder; a delta may have several parts.

    Gradients reach each delta from its own rows only: they are those of a pass of its own.
    """
    encoder, training = parts[0][0].encoder, parts[0][0].training
    keys = {id(live): str(number) for number, (live, _) in enumerate(parts)}
    changing = {keys[id(live)]: live.effects() for live, _ in parts if live.specs}
    pools = LiveBank(list(changing.items()), training)
    entries = [pools.entries.get(keys[id(live)], BARE) for live, encodings in parts for _ in encodings]
    encodings = [encoding for _, own in parts for encoding in own]
    batch = encoder.pack(encodings, entries)
    hidden = encoder.run(batch, pools)
    shares, at, places = [], 0, batch.places
    for live, own in parts:
        shares.append(Share(live, hidden, batch, own, tuple(places[at : at + len(own)])))
        at += len(own)
    return shares


def lowest_trained(live: TrainableDelta) -> int:
    """The lowest layer whose output a live delta changes: the encoder's depth where only the head is trained."""
    anatomy = live.encoder.anatomy
    if not live.full:
        return live.effects().lowest(anatomy.layers)
    starts = [f"{path}." for path in anatomy.layer_paths]
    owners = [
        next((layer for layer, start in enumerate(starts) if name.startswith(start)), 0)
        for name, parameter in live.encoder.model.named_parameters()
        if parameter.requires_grad
    ]
    return min(owners)


def train_upper_layers(live: TrainableDelta, count: int) -> None:
    """Freezes all of the encoder but its upper ``count`` layers: no graph is then built below them.

    Raises SpecError where the encoder has fewer.
    """
    paths = live.encoder.anatomy.layer_paths
    if count > len(paths):
        raise SpecError(f"top-k is to train {count} layers, but {live.encoder.name} has {len(paths)}; lower --top-k")
    live.encoder.model.requires_grad_(False)
    for path in paths[len(paths) - count :]:
        live.encoder.model.get_submodule(path).requires_grad_(True)


def layer_norms(parameters: Mapping[str, torch.nn.Parameter], anatomy: Anatomy) -> dict[str, float]:
    """L2 norms of the gradients by place: ``embeddings``, ``0`` to ``L-1``, ``head``; ``delta`` for a delta's tensors.

    ``parameters`` are named as a live delta names them. What the encoder has beside layers and embeddings is ``rest``.
    """
    layers = {f"model.{path}.": str(number) for number, path in enumerate(anatomy.layer_paths)}
    squares: dict[str, float] = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            place = _place(name, layers)
            squares[place] = squares.get(place, 0.0) + float(torch.linalg.vector_norm(parameter.grad)) ** 2
    return {place: square**0.5 for place, square in squares.items()}


def _place(name: str, layers: Mapping[str, str]) -> str:
    if name.startswith("head."):
        return "head"
    if not name.startswith("model."):
        return "delta"
    found = [place for prefix, place in layers.items() if name.startswith(prefix)]
    return found[0] if found else "embeddings" if "embed" in name else "rest"


def recomputed_layers(live: TrainableDelta) -> tuple[str, ...]:
    """Paths of the layers that gradient checkpointing has run again: from the lowest trained one up."""
    return live.encoder.anatomy.layer_paths[lowest_trained(live) :]


def checkpointing(live: TrainableDelta) -> Around:
    """What a live delta's ``around`` is with gradient checkpointing."""
    paths = recomputed_layers(live)
    return lambda encodings, batch: live.encoder.recomputing(paths)
