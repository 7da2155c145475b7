"""The loop of a fleet: many deltas, each with an optimizer of its own, over one frozen encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from bertology_serve.errors import SpecError
from bertology_serve.training.checkpoint import random_state, set_random_state
from bertology_serve.training.fleet.directory import FleetDirectory
from bertology_serve.training.fleet.member import Member
from bertology_serve.training.fleet.step import gradients


class Fleet:
    """Trains members together; each ends with the weights that it would have had alone.

    A step takes the next batch of every member that is not done. With a directory the fleet continues from its
    checkpoint: the end is the same to the last bit (on a CPU, with the same number of threads). ``finished`` is told
    of each member as soon as it is done and that is on disk.
    """

    def __init__(
        self,
        members: Sequence[Member],
        max_tokens: int = 4096,
        directory: FleetDirectory | None = None,
        save_every: int = 200,
        finished: Callable[[Member], None] = lambda member: None,
    ) -> None:
        _check(members)
        self.members, self.max_tokens = list(members), max_tokens
        self.directory, self.save_every, self.finished = directory, save_every, finished
        self.step = 0

    def run(self) -> None:
        """Trains every member to its end."""
        self._begin()
        while active := [member for member in self.members if not member.done]:
            self._step(active)
            self.step += 1
            ended = [member for member in active if member.done]
            if ended or self.step % self.save_every == 0:
                self._save()
            for member in ended:
                self.finished(member)

    def _step(self, active: Sequence[Member]) -> None:
        started = time.perf_counter()
        batches = [member.take() for member in active]
        losses = gradients(active, batches, self.max_tokens)
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


def _check(members: Sequence[Member]) -> None:
    """Raises SpecError where members cannot share passes."""
    if not members:
        raise SpecError("the fleet has no members; name at least one delta")
    first = members[0]
    for member in members[1:]:
        if member.live.encoder is not first.live.encoder:
            raise SpecError(f"{member.name} and {first.name} have different encoders; load one for the fleet")
        for field, owner in (("precision", "config"), ("trunk_dropout", "live")):
            ours, theirs = (getattr(getattr(one, owner), field) for one in (first, member))
            if ours != theirs:
                raise SpecError(
                    f"{field} is {theirs!r} for {member.name} and {ours!r} for {first.name}; "
                    "it must be the same for the whole fleet"
                )
