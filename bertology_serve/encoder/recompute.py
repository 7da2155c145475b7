"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): modules that run again in the backward pass.

torch's checkpoint does the work. What it does not know is the pass under way, which wrapped modules look up: it is over
when they run again, and is put back for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bertology_serve.encoder.forward_context import CurrentContext


@contextmanager
def recomputed(modules: Sequence[nn.Module], current: CurrentContext) -> Iterator[None]:
    """While it holds, the modules keep nothing for the backward pass but their inputs: they run twice, with the same
    dropout, and their gradients have the same bits (for the same batch, on the same CPU with as many threads). Without
    gradients nothing is changed."""
    with ExitStack() as stack:
        for module in modules if torch.is_grad_enabled() else ():
            assert "forward" not in vars(module)
            module.forward = _twice(module.forward, current)
            stack.callback(delattr, module, "forward")
        yield


def _twice(forward: Callable[..., Any], current: CurrentContext) -> Callable[..., Any]:
    def run(*inputs: Any, **named: Any) -> Any:
        now = current.it

        def again(*inputs: Any, **named: Any) -> Any:
            with current.during(now):
                return forward(*inputs, **named)

        return checkpoint(again, *inputs, use_reentrant=False, **named)

    return run
