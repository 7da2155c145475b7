"""The loop of a fleet: many deltas, each with its optimizer, their gradients from one pass of the frozen encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bertology_serve.encoder.trainable import Share, TrainableDelta, lowest_trained, run_together
from bertology_serve.errors import SpecError
from bertology_serve.files import JsonObject
from bertology_serve.tasks.base import Item, Task
from bertology_serve.tasks.spec import WHOLE_BATCH
from bertology_serve.training.batches import micro_batches
from bertology_serve.training.fleet.fleet_directory import FleetDirectory, FleetWatcher, Quiet
from bertology_serve.training.methods import count_parameters
from bertology_serve.training.run_directory import random_state, set_random_state
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import Line, Trainer, autocast, rounding


class Fleet:
    """Trains members together; each ends with the weights that it would have had alone.

    A step takes the next batch of every member that is not done. With a directory the fleet continues from its
    checkpoint: the end is the same to the last bit (on a CPU, with the same number of threads). ``finished`` is told
    of each member as soon as it is done and that is on disk. ``losers`` names, after a step, those members in training
    that are to make no other. Once time is up (``late``), none is begun: not a step, nor a pass or an evaluation of the
    step under way.
    """

    def __init__(
        self,
        members: Sequence[Member],
        max_tokens: int = 4096,
        directory: FleetDirectory | None = None,
        save_every: int = 200,
        finished: Callable[[Member], None] = lambda member: None,
        losers: Callable[[Sequence[Member]], Sequence[Member]] = lambda active: (),
        late: Callable[[], bool] = lambda: False,
    ) -> None:
        _check(members)
        self.members, self.max_tokens = list(members), max_tokens
        self.directory, self.save_every, self.finished, self.losers = directory, save_every, finished, losers
        self.late, self.step = late, 0
        for member in self.members:
            member.late = late

    def run(self) -> None:
        self._begin()
        while active := [member for member in self.members if not member.done]:
            self._step(active)
            left = [member for member in active if not member.done]
            for member in left if self.late() else self.losers(left):
                member.drop()
            ended = [member for member in active if member.done]
            if ended or self.step % self.save_every == 0:
                self._save()
            for member in ended:
                self.finished(member)

    def _step(self, active: Sequence[Member]) -> None:
        started = time.perf_counter()
        batches = [member.take() for member in active]
        losses = gradients(active, batches, self.max_tokens, self.late)
        if losses is None:
            return
        self.step += 1
        seconds = time.perf_counter() - started
        tokens = [sum(item.tokens for item in batch) for batch in batches]
        for member, batch, loss, own in zip(active, batches, losses, tokens, strict=True):
            member.learn(batch, loss, seconds * own / sum(tokens))

    def _begin(self) -> None:
        torch.manual_seed(0)  # for dropout inside the encoder, which the members share
        found = self.directory.load_all([m.name for m in self.members]) if self.directory else None
        for member in self.members:
            member.begin(found[0][member.name] if found else None)
        if found:
            set_random_state(self.members[0].live.encoder.device, found[1])
        for member in self.members:
            if member.done:
                self.finished(member)

    def _save(self) -> None:
        if self.directory is not None:
            stored = {member.name: member.stored() for member in self.members}
            self.directory.save_all(stored, random_state(self.members[0].live.encoder.device))


def _shared(member: Member) -> dict[str, object]:
    return {"precision": member.config.machine.precision, "trunk_dropout": member.live.trunk_dropout}


def _check(members: Sequence[Member]) -> None:
    if not members:
        raise SpecError("the fleet has no members; name at least one delta")
    first = members[0]
    for member in members[1:]:
        if member.live.encoder is not first.live.encoder:
            raise SpecError(f"{member.name} and {first.name} have different encoders; load one for the fleet")
        for field, theirs in _shared(member).items():
            if theirs != (ours := _shared(first)[field]):
                raise SpecError(
                    f"{field} is {theirs!r} for {member.name} and {ours!r} for {first.name}; "
                    "it must be the same for the whole fleet"
                )


@dataclass(frozen=True)
class Piece:
    """Some items of one member's batch, which share a pass; ``weight`` is that of the whole batch."""

    member: Member
    items: tuple[Item, ...]
    weight: int

    @property
    def sequences(self) -> int:
        return sum(len(item.encodings) for item in self.items)

    @property
    def longest(self) -> int:
        return max(item.longest for item in self.items)

    @property
    def tokens(self) -> int:
        return sum(item.tokens for item in self.items)


def gradients(
    members: Sequence[Member],
    batches: Sequence[Sequence[Item]],
    max_tokens: int,
    late: Callable[[], bool] = lambda: False,
) -> list[float] | None:
    """Adds to each member's gradients that of its batch's mean loss; returns those losses; ``None`` once it is late.

    A pass has up to ``max_tokens`` rows. Members share passes only with those whose lowest layer is theirs, so that
    no graph is built where none would be without the others.
    """
    losses = dict.fromkeys(map(id, members), 0.0)
    cut = [piece for member, batch in zip(members, batches, strict=True) for piece in pieces(member, batch, max_tokens)]
    for group in joined(cut, max_tokens, padded=not members[0].live.encoder.packs):
        if late():
            return None
        how = members[0].config.machine.precision, members[0].live.encoder
        with rounding(*how):
            with autocast(*how):
                shares = run_together([(p.member.live, [e for item in p.items for e in item.encodings]) for p in group])
            parts = [_loss(piece, share) for piece, share in zip(group, shares, strict=True)]
            torch.autograd.backward(parts)
        for piece, part in zip(group, parts, strict=True):
            losses[id(piece.member)] += part.item()
    return list(losses.values())


def pieces(member: Member, batch: Sequence[Item], max_tokens: int) -> Iterator[Piece]:
    """A batch as a run of the member by itself would cut it, or smaller."""
    weight = max(1, member.task.weight([item.target for item in batch]))
    cut = micro_batches(batch, min(max_tokens, member.config.machine.max_tokens), not member.live.encoder.packs)
    for group in [batch] if member.task.kind in WHOLE_BATCH else cut:
        yield Piece(member, tuple(group), weight)


def joined(found: Sequence[Piece], max_tokens: int, padded: bool) -> list[list[Piece]]:
    """Pieces that share a pass: of one lowest layer, at most ``max_tokens`` rows, in a fixed order."""
    groups: list[list[Piece]] = []
    rows = 0
    for piece in sorted(found, key=lambda piece: (piece.member.lowest, piece.longest if padded else 0)):
        own = groups[-1] if groups and groups[-1][-1].member.lowest == piece.member.lowest else []
        rows = _rows([*own, piece], padded)
        if not own or rows > max_tokens:
            groups.append([])
        groups[-1].append(piece)
    return groups


def _rows(group: Sequence[Piece], padded: bool) -> int:
    if padded:
        return sum(piece.sequences for piece in group) * max(piece.longest for piece in group)
    return sum(piece.tokens for piece in group)


def _loss(piece: Piece, share: Share) -> torch.Tensor:
    """The piece's share of its batch's mean loss, the head's dropout drawn by the member."""
    lengths = [len(encoding) for item in piece.items for encoding in item.encodings]
    with piece.member.drawing():
        out = share.output()
    return piece.member.task.loss(out, lengths, [item.target for item in piece.items]) / piece.weight


RANDOM = "rng."
ALONE = ("trunk_cache", "checkpointing")


class Member(Trainer):
    """A ``Trainer`` whose steps a ``Fleet`` makes. Its optimizer, clipping, schedule and early stop are its own.

    So is the dropout of its head, which is that of a run by itself. ``failure`` says why it was given up; the others
    go on. ``latest`` are the metrics of its last evaluation; there is no other once it is ``late``.
    """

    def __init__(
        self,
        name: str,
        live: TrainableDelta,
        task: Task,
        items: Sequence[Item],
        config: TrainConfig,
        dev: Sequence[Item] = (),
        directory: FleetDirectory | None = None,
        watcher: FleetWatcher | None = None,
    ) -> None:
        check_frozen(name, config)
        super().__init__(live, task, items, config, dev)
        self.name, self.fleet, self.fleet_watcher = name, directory, watcher or Quiet()
        self.failure = ""
        self.latest: Mapping[str, float] = {}
        self.late: Callable[[], bool] = lambda: False
        self.random = _seeded(live, config.optim.seed)
        self.lowest = lowest_trained(live)

    @property
    def done(self) -> bool:
        return super().done or bool(self.failure)

    def begin(self, found: tuple[Mapping[str, Tensor], JsonObject] | None) -> None:
        """From the first step, or from where a checkpoint stands."""
        if found is not None:
            tensors, state = found
            self.failure, self.latest = state["failure"], state["latest"]
            self.restore(tensors, state["run"])
            self.random = {name: tensor for name, tensor in tensors.items() if name.startswith(RANDOM)}
        self.live.train()
        self.fleet_watcher.joined(self.name, self.state.step, self.total, count_parameters(self.live))
        if found is None:
            self.prepare()

    def take(self) -> list[Item]:
        return [self.items[i] for i in self.sampler.take(self.config.optim.batch_size)]

    def learn(self, batch: Sequence[Item], loss: float, seconds: float) -> None:
        """One step on the gradients that the batch of that mean loss left; it took ``seconds``."""
        try:
            self._learn(batch, loss, time.perf_counter() - seconds)
        except SpecError as error:
            self.fail(str(error))
            return
        if self.done:
            self._leave()

    def prepare(self) -> None:
        if not self.late():
            super().prepare()

    def _evaluate(self) -> None:
        if not self.late():
            super()._evaluate()

    def drop(self) -> None:
        """Ends training here: others are better."""
        self.state.stopped = True
        self._leave()
        self.fleet_watcher.dropped(self.name, self.state.step)

    def _leave(self) -> None:
        self._end()
        self.optimizer.zero_grad(set_to_none=True)
        self.best = {}
        self.optimizer.state.clear()

    def fail(self, reason: str) -> None:
        self.failure = reason
        self.optimizer.zero_grad(set_to_none=True)
        self.fleet_watcher.failed(self.name, reason)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Random numbers come from the member's own generators."""
        device = self.live.encoder.device
        outside = random_state(device)
        set_random_state(device, self.random)
        try:
            yield
        finally:
            self.random = random_state(device)
            set_random_state(device, outside)

    def stored(self) -> tuple[dict[str, Tensor], JsonObject]:
        """What ``begin`` continues from."""
        state = {"run": self.state.as_dict(), "failure": self.failure, "latest": self.latest}
        return {**self.tensors(), **self.random}, state

    def _log(self, line: Line) -> None:
        if self.fleet is not None:
            self.fleet.log_of(self.name, line)
        if "eval" in line:
            self.latest = line["eval"]
            self.fleet_watcher.evaluated(self.name, line)
        else:
            self.fleet_watcher.stepped(self.name, line)


def check_frozen(name: str, config: TrainConfig) -> None:
    """Raises SpecError where a delta trains the encoder that all share, or wants passes of its own."""
    if config.full or config.plan.recipe:
        raise SpecError(
            f"{name}: a fleet shares one frozen encoder, but {config.plan.recipe or config.method[0]} trains its own; "
            "take a kind of delta or the probe, or run it with train"
        )
    alone = next((flag for flag in ALONE if getattr(config.machine, flag)), None)
    if alone is not None:
        raise SpecError(f"{name}: {alone} is for one run, and a fleet's passes are shared; leave it out")


def _seeded(live: TrainableDelta, seed: int) -> dict[str, Tensor]:
    """The state of the random generators after ``torch.manual_seed(seed)``."""
    device = live.encoder.device
    outside = random_state(device)
    torch.manual_seed(seed)
    mine = random_state(device)
    set_random_state(device, outside)
    return mine
