"""The step loop: one delta, one optimizer, batches of examples, and a run that can be killed at any moment.

``Callback`` is what a run tells whoever watches it; its lines are those of ``log.jsonl``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import TrainableDelta, layer_norms, trained
from bertology_serve.errors import SpecError
from bertology_serve.files import JsonObject
from bertology_serve.tasks.base import Item, Task
from bertology_serve.tasks.classification import LabelTask
from bertology_serve.tasks.spec import WHOLE_BATCH, Encoding
from bertology_serve.training.batches import Buckets, Sampler, micro_batches
from bertology_serve.training.evaluation import measure
from bertology_serve.training.methods import (
    ParameterCount,
    count_parameters,
    factor,
    make_optimizer,
    moments,
    regulariser_for,
    set_moments,
    set_rate,
    uses_bf16,
)
from bertology_serve.training.processes import ALONE, Processes
from bertology_serve.training.run_directory import RunDirectory, RunState, random_state, set_random_state
from bertology_serve.training.train_config import CONTRASTIVE, START_PROBE, TrainConfig

Line = Mapping[str, Any]


class Callback(Protocol):
    """Sees a run from outside; see ``Trainer`` for what the lines hold."""

    def staged(self, stage: int, count: int, title: str) -> None:
        """Stage ``stage`` (from 1) of a recipe's ``count`` comes next."""
        return

    def began(self, step: int, total: int, parameters: ParameterCount) -> None:
        """Training begins after ``step`` of ``total`` steps."""
        return

    def stepped(self, line: Line) -> None:
        """A step was made."""
        return

    def evaluated(self, line: Line) -> None:
        """The evaluation data was answered."""
        return


class NoCallback(Callback):
    """For a run that nobody watches."""


class CallbackList:
    """Tells several watchers, in their order."""

    def __init__(self, watchers: Sequence[Callback]) -> None:
        self.watchers = watchers

    def staged(self, stage: int, count: int, title: str) -> None:
        for watcher in self.watchers:
            watcher.staged(stage, count, title)

    def began(self, step: int, total: int, parameters: ParameterCount) -> None:
        for watcher in self.watchers:
            watcher.began(step, total, parameters)

    def stepped(self, line: Line) -> None:
        for watcher in self.watchers:
            watcher.stepped(line)

    def evaluated(self, line: Line) -> None:
        for watcher in self.watchers:
            watcher.evaluated(line)


class Trainer:
    """Trains a live delta on items, and measures it on ``dev`` items where there are any.

    With a run directory the run continues from its checkpoint, if it has one, and writes them: N steps give the same
    bits as N/2 steps, a kill, and N/2 steps more (on CPU, with the same number of threads). Every step is a log line
    ``{step, epoch, loss, lr, grad_norm, tokens, tokens_per_s}``, every evaluation ``{step, epoch, eval: metrics}``;
    the lines of a recipe begin with ``stage``, from 1.
    """

    def __init__(
        self,
        live: TrainableDelta,
        task: Task,
        items: Sequence[Item],
        config: TrainConfig,
        dev: Sequence[Item] = (),
        directory: RunDirectory | None = None,
        watcher: Callback | None = None,
        stage: int = 0,
        processes: Processes = ALONE,
    ) -> None:
        check_divisible(task, processes)
        self.processes = processes
        self.live, self.task, self.items, self.config, self.dev = live, task, items, config, dev
        self.directory, self.watcher = directory, watcher or NoCallback()
        self.parameters = trained(live)
        self.optimizer = make_optimizer(live, config)
        self.regulariser = regulariser_for(live, config)
        lengths, window = [item.longest for item in items], config.optim.bucket_batches
        buckets = Buckets(lengths, config.optim.batch_size, window) if window else None
        self.sampler = Sampler(len(items), config.optim.seed, buckets=buckets)
        steps_an_epoch = math.ceil(len(items) / config.optim.batch_size)
        self.eval_every = config.eval.eval_every or steps_an_epoch
        steps = config.passes(len(items)) * steps_an_epoch
        self.total = min(steps, config.optim.max_steps or steps)
        self.state = RunState(stage)
        self.start: Mapping[str, float] | None = None
        self.first: Callable[[], None] | None = None
        self.best: dict[str, Tensor] = {}

    def run(self) -> RunState:
        """Trains to the end; the live delta then holds what is to be kept. However it ends, dropout is off after it."""
        try:
            self._steps()
        finally:
            self._end()
        return self.state

    def _steps(self) -> None:
        self._begin()
        while not self.done:
            started = time.perf_counter()
            batch = [self.items[i] for i in self.sampler.take(self.config.optim.batch_size)]
            self.processes.seed(self.config.optim.seed, self.state.step)
            with self.regulariser.mixed():
                loss = self.gradient(batch)
            self._learn(batch, loss, started)
            if self._is_due(self.eval_every) or self._is_due(self.config.eval.save_every):
                self._save()

    def begin_at(self, start: Mapping[str, float], first: Callable[[], None] | None = None) -> None:
        """``start`` are the dev metrics of what training begins with: only a state that beats them is kept, in the main
        metric or, where that is the same, in the loss by a hundredth: on few rows the metric says little.

        ``first`` is what is done to the live delta before the first step; what it leaves is such a state, too. Without
        dev items nothing says when to stop learning few rows by heart: then it is all, unless steps are asked for.
        """
        self.first = first
        if first and not self.dev and self.config.stops_at_start:
            self.total = 0
        if self.dev and self.config.eval.keep == "best":
            self.start, self.state.metrics = start, dict(start)
            self.state.best = _to_beat(start)

    def prepare(self) -> None:
        """What comes before the first step of a run that is not continued.

        Of embeddings, what training begins with answers already (as the encoder itself does, with most kinds): it
        counts as the first evaluation, so that what is kept is no worse on the dev set. So does what ``first`` leaves;
        where the dev set finds that no better than the start, it is undone.
        """
        if self.first is not None:
            before, started = _copies(self.parameters), time.perf_counter()
            self.first()
            self.state.start = CONTRASTIVE
            self.state.seconds += time.perf_counter() - started
        if (self.first or self.live.task.kind in WHOLE_BATCH) and self.config.eval.keep == "best":
            self._evaluate()
            if self.first and self.unimproved:
                self._set_parameters(before)
                self.state.start, self.state.stale, self.state.stopped = START_PROBE, 0, False
            self.live.train()

    @property
    def unimproved(self) -> bool:
        """Whether what training began with is still the best."""
        return self.start is not None and self.state.best == _to_beat(self.start)

    @property
    def done(self) -> bool:
        return self.state.step >= self.total or self.state.stopped

    def gradient(self, batch: Sequence[Item]) -> float:
        """Adds the gradient of the batch's mean loss, micro-batch by micro-batch; returns that loss.

        Of several processes each runs its share of the batch, and all get the whole gradient and loss.
        """
        weight = max(1, self.task.weight([item.target for item in batch]))
        encoder = self.live.encoder
        with self.processes.drawing(encoder.device), rounding(self.config.machine.precision, encoder):
            loss = self._add_gradient(self.processes.share(batch), weight)
        self.processes.sum_gradients(self.parameters.values())
        return sum(self.processes.gathered(loss))

    def _add_gradient(self, items: Sequence[Item], weight: int) -> float:
        """Adds the gradient of the items' losses over ``weight``; returns their sum."""
        groups = micro_batches(items, self.config.machine.max_tokens, not self.live.encoder.packs)

        def run(group: Sequence[Item]) -> Tensor:
            with autocast(self.config.machine.precision, self.live.encoder):
                return self.live(_encodings(group))  # type: ignore[no-any-return]

        def loss(out: Tensor, group: Sequence[Item]) -> Tensor:
            lengths = [len(encoding) for encoding in _encodings(group)]
            return self.task.loss(out, lengths, [item.target for item in group]) / weight

        together = [groups] if self.task.kind in WHOLE_BATCH else [[group] for group in groups]
        return sum(add_gradient(parts, run, loss, self.live.encoder.device) for parts in together)

    def _learn(self, batch: Sequence[Item], loss: float, started: float) -> None:
        """One step on the gradients that a batch of that mean loss left, and an evaluation where it is due."""
        norms = self._layer_norms()
        rate, norm = self._update(loss)
        self._log_step(batch, {"loss": loss, "lr": rate, "grad_norm": norm, **norms}, started)
        if self._is_due(self.eval_every):
            self._evaluate()

    def _update(self, loss: float) -> tuple[float, float]:
        """One step of the optimizer on the gradients; returns the learning rate and the gradient's norm."""
        rate = set_rate(
            self.optimizer, factor(self.state.step, self.total, self.config.optim.warmup, self.config.optim.schedule)
        )
        norm = float(clip_grad_norm_(self.parameters.values(), self.config.optim.clip or math.inf, foreach=True))
        self.state.step += 1
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise SpecError(
                f"step {self.state.step}: the loss is {loss:g} and its gradient {norm:g} long; "
                f"lower --learning-rate (it is {self.optimizer.param_groups[0]['initial_rate']:g})"
            )
        self.regulariser.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.state.epoch, self.state.offset = self.sampler.epoch, self.sampler.offset
        return rate, norm

    def _layer_norms(self) -> JsonObject:
        """What the log says of the first steps' gradients, before they are clipped."""
        if self.state.step >= self.config.eval.gradient_steps:
            return {}
        return {"layer_norms": layer_norms(self.parameters, self.live.encoder.anatomy)}

    def _log_step(self, batch: Sequence[Item], facts: Line, started: float) -> None:
        seconds, tokens = time.perf_counter() - started, sum(item.tokens for item in batch)
        self.state.seconds += seconds
        line = {**self._place(), **facts}
        line |= {"tokens": tokens, "tokens_per_s": round(tokens / seconds, 1)}
        self._log(line)
        self.watcher.stepped(line)

    def _evaluate(self) -> None:
        """Measures the delta, remembers the best state, and stops where patience runs out."""
        if not self.dev:
            return
        started, state = time.perf_counter(), self.state
        metrics = measure(self.live, self.task, self.dev, self.config.machine.max_tokens, self.processes)
        rank = self._rank(metrics)
        better = not self._flattered(metrics) and (not state.best or rank > state.best)
        state.stale = 0 if better else state.stale + 1
        if better:
            state.best, state.best_step = rank, state.step
        if better or self.config.eval.keep == "last":
            state.metrics = metrics
        if better and self.config.eval.keep == "best":
            self.best = _copies(self.parameters)
        state.stopped = self.config.eval.patience is not None and state.stale >= self.config.eval.patience
        state.seconds += time.perf_counter() - started
        line = {**self._place(), "eval": metrics}
        self._log(line)
        self.watcher.evaluated(line)

    def _flattered(self, metrics: Mapping[str, float]) -> bool:
        """Whether scores say no more of the dev items, by a hundredth, than the probe's did, whatever the metric says:
        the best of many states on few items is often a lucky one.
        """
        return (
            self.start is not None and isinstance(self.task, LabelTask) and metrics["loss"] > 0.99 * self.start["loss"]
        )

    def _rank(self, metrics: Mapping[str, float]) -> list[float]:
        """What is compared: the main metric, which stands first, then the loss."""
        return [next(iter(metrics.values())), -metrics.get("loss", 0.0)]

    def _begin(self) -> None:
        """From the first step, or from where the checkpoint stands."""
        torch.manual_seed(self.config.optim.seed)
        found = self.directory.load(self.state.stage) if self.directory else None
        if found is not None:
            self.restore(*found)
            set_random_state(self.live.encoder.device, found[0])
        else:
            self.live.eval()
            self.regulariser.begin(self._gradients)
        self.live.train()
        self.watcher.began(self.state.step, self.total, count_parameters(self.live))
        if found is None:
            self.prepare()

    def _gradients(self) -> Iterator[None]:
        """Leaves the gradient of each batch of the data, in its order, in the parameters, and clears them after."""
        for start in range(0, len(self.items), self.config.optim.batch_size):
            self.gradient(self.items[start : start + self.config.optim.batch_size])
            yield
            self.optimizer.zero_grad(set_to_none=True)

    def _save(self) -> None:
        if self.directory is not None:
            self.directory.save(self.tensors() | random_state(self.live.encoder.device), self.state.as_dict())

    def _end(self) -> None:
        self.live.eval()
        self._set_parameters(self.best)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold to continue, beside ``state`` and the state of the random generators."""
        tensors: dict[str, Tensor] = {f"parameter.{name}": parameter for name, parameter in self.parameters.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"regulariser.{name}": tensor for name, tensor in self.regulariser.tensors().items()}
        return tensors | moments(self.optimizer, self.parameters)

    def restore(self, tensors: Mapping[str, Tensor], state: JsonObject) -> None:
        """The inverse of ``tensors``."""
        self.state = RunState.from_dict(state)
        self.sampler.epoch, self.sampler.offset = self.state.epoch, self.state.offset
        self._set_parameters(_named(tensors, "parameter."))
        self.best = _named(tensors, "best.")
        self.regulariser.restore(_named(tensors, "regulariser."))
        set_moments(self.optimizer, self.parameters, tensors)

    def _set_parameters(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)

    def _is_due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.total

    def _place(self) -> JsonObject:
        epoch = self.state.epoch + self.state.offset / len(self.items)
        stage = {"stage": self.state.stage} if self.state.stage else {}
        return {**stage, "step": self.state.step, "epoch": round(epoch, 4)}

    def _log(self, line: Line) -> None:
        if self.directory is not None:
            self.directory.log(line)


def _named(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _encodings(items: Sequence[Item]) -> list[Encoding]:
    return [encoding for item in items for encoding in item.encodings]


def _to_beat(start: Mapping[str, float]) -> list[float]:
    """What the rank of a state that is kept is above, where training begins with a start of these metrics."""
    return [next(iter(start.values())), -0.99 * start.get("loss", 0.0)]


def _copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}


def add_gradient(
    groups: Sequence[Sequence[Item]],
    run: Callable[[Sequence[Item]], Tensor],
    loss: Callable[[Tensor, Sequence[Item]], Tensor],
    device: torch.device,
) -> float:
    """Adds the gradient of the loss of all groups' outputs together; returns that loss.

    Only one group's graph is held at a time. Several run twice, with the same dropout: first without a graph, which
    gives the loss and its gradient in the outputs; from there it flows on as each runs again (GradCache, Gao et al.
    2021, arXiv 2101.06983).
    """
    items = [item for group in groups for item in group]
    if len(groups) == 1:
        whole = loss(run(items), items)
        torch.autograd.backward(whole)
        return whole.item()
    states, outs = [], []
    with torch.no_grad():
        for group in groups:
            states.append(random_state(device))
            outs.append(run(group).requires_grad_())
    whole = loss(torch.cat(outs), items)
    torch.autograd.backward(whole)
    for group, state, out in zip(groups, states, outs, strict=True):
        set_random_state(device, state)
        torch.autograd.backward(run(group), out.grad)
    return whole.item()


def check_divisible(task: Task, processes: Processes) -> None:
    """Raises SpecError where a batch has to stay whole."""
    if processes.count > 1 and task.kind in WHOLE_BATCH:
        raise SpecError(
            f"the loss of {task.kind} compares all pairs of a batch, which {processes.count} processes cannot divide; "
            "run it in one"
        )


def autocast(precision: str, encoder: Encoder) -> AbstractContextManager[object]:
    """bf16 for a forward pass where the configuration and the hardware say so, but for ``rounding``; parameters stay
    float32.
    """
    bf16 = uses_bf16(precision, encoder.device) and not encoder.can_round
    return torch.autocast(encoder.device.type, dtype=torch.bfloat16) if bf16 else nullcontext()


def rounding(precision: str, encoder: Encoder) -> AbstractContextManager[object]:
    """bf16 on a CPU, for a forward pass and the backward pass: of the products by frozen weights alone, which are cast
    but once.
    """
    bf16 = uses_bf16(precision, encoder.device) and encoder.can_round
    return encoder.rounded() if bf16 else nullcontext()
