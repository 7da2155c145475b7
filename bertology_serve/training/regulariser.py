"""What a form of full fine-tuning does around each step. Plain training is the form that does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.optim import Optimizer

from bertology_serve.encoder.live import LiveDelta


class Regulariser:
    """Nothing, in every place where a form may do something.

    A form is made while the weights are the pretrained ones. It draws from torch's global generator, so that a run
    continues with the numbers that it would have had.
    """

    def __init__(self, live: LiveDelta) -> None:
        self.live = live

    def begin(self, gradients: Callable[[], Iterator[None]]) -> None:
        """Before the first step, at the pretrained weights.

        Iterating over ``gradients()`` puts the gradient of each batch of the training data into the parameters, once,
        without dropout.
        """

    def mixed(self) -> AbstractContextManager[None]:
        """Holds while the gradient of one batch is made, all its micro-batches included."""
        return nullcontext()

    def step(self, optimizer: Optimizer) -> None:
        """The optimizer's step, on gradients that were clipped."""
        optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold to continue."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``tensors``."""
