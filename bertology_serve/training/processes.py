"""One run in several processes, a GPU (or some CPU cores) each: every batch is divided among them.

accelerate starts them and connects them (``accelerate launch -m bertology_serve train ...``). All hold the same
weights, make the same updates, and know the whole batch: each adds its own examples' part of the whole batch's mean
loss, and the parts' gradients are summed. So a run is that of one process but for the order of sums, and for dropout,
which each process draws for itself. The first process leads: it alone writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from bertology_serve.errors import SpecError, Unsupported
from bertology_serve.tasks.base import Item
from bertology_serve.training.run_directory import random_state, set_random_state

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Processes:
    """Those of one run as this one, number ``rank`` of ``count``, sees them. One alone has nobody to ask."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def share(self, batch: Sequence[Item]) -> list[Item]:
        """This process's part of a batch; the parts are about equal in tokens."""
        return sorted(batch, key=lambda item: item.longest)[self.rank :: self.count]

    def wait(self) -> None:
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def gathered(self, own: Thing) -> list[Thing]:
        """What each process has (anything that can be pickled), in the order of their ranks."""
        if self.count == 1:
            return [own]
        from accelerate.utils import gather_object

        return list(gather_object([own]))

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Every process gets the sum of all gradients; a parameter that no process used keeps none."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        own = list(parameters)
        used = torch.tensor([float(p.grad is not None) for p in own], device=own[0].device)
        shared = [p for p, count in zip(own, reduce(used, "sum").tolist(), strict=True) if count]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in shared]
        total = reduce(torch.cat([grad.flatten() for grad in grads]), "sum")  # one message, not one a parameter
        for parameter, part in zip(shared, total.split([p.numel() for p in shared]), strict=True):
            parameter.grad = part.view_as(parameter)

    def seed(self, run: int, step: int) -> None:
        """Before a step of several processes: all go on with the same random numbers, whatever each drew before."""
        if self.count > 1:
            torch.manual_seed((run * 1_000_003 + step) * (self.count + 1))

    @contextmanager
    def drawing(self, device: torch.device) -> Iterator[None]:
        """Dropout of this process's own; after it all have the same random numbers again."""
        if self.count == 1:
            yield
            return
        common: dict[str, Tensor] = random_state(device)
        torch.manual_seed(torch.initial_seed() + self.rank + 1)
        try:
            yield
        finally:
            set_random_state(device, common)


ALONE = Processes()


def started() -> int:
    """How many processes a launcher says that it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_alone(command: str) -> None:
    """Raises SpecError where a command that knows one process only was started in several."""
    if started() > 1:
        raise SpecError(f"{command} runs in one process, but {started()} were started; start it once for each GPU")


def join(device: str) -> tuple[Processes, str]:
    """The processes that ``accelerate launch`` or torchrun started, connected, and the device of this one.

    Raises SpecError where all would compute on one GPU, Unsupported without accelerate.
    """
    if started() == 1:
        return ALONE, device
    if find_spec("accelerate") is None:
        raise Unsupported("several processes need accelerate, which is not installed; take bertology-serve[accelerate]")
    if torch.device(device).index is not None:
        raise SpecError(f"device is {device!r}, but there are several processes; take cuda: each gets a GPU of its own")
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    return Processes(state.process_index, state.num_processes), str(state.device)
