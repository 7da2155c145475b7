"""One delta of a fleet: a trainer that is driven step by step, with random numbers of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import SpecError
from bertology_serve.files import JsonObject
from bertology_serve.tasks.base import Task
from bertology_serve.training.batches import Item
from bertology_serve.training.fleet.fleet_directory import FleetDirectory, FleetWatcher, Quiet
from bertology_serve.training.layers import lowest_trained
from bertology_serve.training.methods import count_parameters
from bertology_serve.training.run_directory import random_state, set_random_state
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import Line, Trainer

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
        """Whether there is no further step to make."""
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
            self.measure_start()

    def take(self) -> list[Item]:
        """The next batch."""
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
        """Gives the member up."""
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
