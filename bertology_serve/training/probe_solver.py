"""The linear probe of a training run, solved to its optimum on features of one pass, over a path of C."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.files import JsonObject
from bertology_serve.tasks.base import Answer, Item, Task
from bertology_serve.tasks.classification import LabelTask
from bertology_serve.tasks.logistic import LOOSE, Logistic, Ridge, Solution
from bertology_serve.tasks.spec import MULTI_LABEL
from bertology_serve.training.frozen_rows import Features, features
from bertology_serve.training.methods import count_parameters
from bertology_serve.training.run_directory import RunDirectory, RunState
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import Callback, NoCallback

HELD_OUT, FOLDS, MANY = 0.1, 5, 2000
"""Without dev items: the part that is held out of many; of fewer than ``MANY`` every fold is, once."""


@dataclass(frozen=True)
class Part:
    """Some items, their features by layer, and their scores [N], or what their labels weigh (``LabelTask.rows``)."""

    items: Sequence[Item]
    rows: Features
    targets: Tensor

    def at(self, index: Tensor) -> Part:
        """Those of a list of numbers."""
        rows = {layer: rows[index] for layer, rows in self.rows.items()}
        return Part([self.items[i] for i in index.tolist()], rows, self.targets[index])


@dataclass(frozen=True)
class ChosenC:
    """The value of C that did best on one layer, and how: ``rank`` is what is compared, the larger the better.

    ``solution`` is the first fold's, ``logits`` are those of what was held out, in the order of ``Held.all``.
    """

    layer: int
    index: int
    c: float
    rank: list[float]
    metrics: dict[str, float]
    train_loss: float
    solution: Solution
    logits: Tensor


@dataclass(frozen=True)
class Held:
    """What judges the values of C: for each fold what is fitted and what is held out, and all of the latter."""

    folds: Sequence[tuple[Part, Part]]
    all: Part


class Solver:
    """Solves a live probe for every C of a path from 1e-7 to 1e2 (LP-FT's), each from the one before.

    C is chosen on ``dev`` items by the main metric. Without any, the loss chooses, of which few rows say more: by
    five-fold cross-validation, on a tenth that is held out where items are many. The probe is then solved tightly for
    that C on all items. Every C is a log line ``{step, epoch, layer, c, loss, eval}``, ``loss`` the
    objective reached. With all layers each gets a probe of its own from the same pass; the last one's is the live
    delta's, and ``layers.json`` says how the others do. It is deterministic and short: one that was interrupted begins
    again, on the features that were kept.
    """

    def __init__(
        self,
        live: TrainableDelta,
        task: Task,
        items: Sequence[Item],
        config: TrainConfig,
        dev: Sequence[Item],
        directory: RunDirectory,
        watcher: Callback | None = None,
        stage: int = 0,
        folder: Path | None = None,
    ) -> None:
        """The features are kept in ``folder``; by default where other runs find them."""
        self.live, self.task, self.items, self.config, self.dev = live, task, items, config, dev
        self.directory, self.watcher, self.state = directory, watcher or NoCallback(), RunState(stage)
        self.folder = folder or directory.features
        depth = live.encoder.anatomy.layers
        if config.plan.lp_layers == "all":
            live.encoder.check_layers("a probe of each layer")
        self.layers = tuple(range(depth + 1)) if config.plan.lp_layers == "all" else (depth,)
        self.path = torch.logspace(-7, 2, config.plan.lp_path, dtype=torch.float64).tolist()

    def run(self) -> RunState:
        """Solves; the live delta's head then holds the last layer's probe."""
        started, state = time.perf_counter(), self.state
        self.directory.load(state.stage)
        self.watcher.began(0, len(self.path) * len(self.layers), count_parameters(self.live))
        whole = self._part(self.items)
        dev = self._part(self.dev) if self.dev else None
        held = Held([(whole, dev)], dev) if dev else _folds(whole, self.config.optim.seed)
        choices = [self._choose(layer, held) for layer in self.layers]
        best, last = choices[-1], self.layers[-1]
        problem = self._problem(whole, last)
        set_head(self.live, problem.solve(best.c, best.solution.raw if dev else None))
        state.best, state.best_step = best.rank, state.step - len(self.path) + best.index + 1
        state.metrics = self._measure(self._logits(dev), dev) if dev else {}
        state.seconds += time.perf_counter() - started
        if len(choices) > 1:
            self.directory.write_layers([_shown(choice) for choice in choices])
        return state

    def answers(self) -> list[Answer]:
        return self._answers(self._logits(self._part(self.dev)), self.dev)

    def _choose(self, layer: int, held: Held) -> ChosenC:
        paths = (self._solutions(layer, fit) for fit, _ in held.folds)
        found = [self._tried(layer, index, solutions, held) for index, solutions in enumerate(zip(*paths, strict=True))]
        best = max(found, key=lambda choice: (choice.rank, -choice.index))
        metrics = self._measure(best.logits.float(), held.all)
        self.watcher.evaluated({**self._place(), "layer": layer, "c": best.c, "eval": metrics})
        return replace(best, metrics=metrics)

    def _problem(self, part: Part, layer: int) -> Logistic | Ridge:
        """What is solved: logistic regression, one-vs-rest where several labels may apply; for scores ridge."""
        if not isinstance(self.task, LabelTask):
            return Ridge(part.rows[layer], part.targets)
        if self.task.kind != MULTI_LABEL:
            return Logistic(part.rows[layer], part.targets)
        has, lacks = part.targets.chunk(2, 1)
        return Logistic(part.rows[layer], has, lacks)

    def _solutions(self, layer: int, fit: Part) -> Iterator[Solution]:
        problem, start = self._problem(fit, layer), None
        for c in self.path:
            solution = problem.solve(c, start, LOOSE)
            start = solution.raw
            yield solution

    def _tried(self, layer: int, index: int, solutions: Sequence[Solution], held: Held) -> ChosenC:
        pairs = zip(solutions, held.folds, strict=True)
        logits = torch.cat([solution.logits(out.rows[layer]) for solution, (_, out) in pairs])
        if isinstance(self.task, LabelTask):  # without the answers in words, of which there are many
            main = self.task.quick(logits, held.all.targets)
            metrics = {self.task.main_metric: main, "loss": self._loss(logits, held.all)}
        else:
            metrics = self._measure(logits, held.all)
        self.state.step += 1
        c, loss = self.path[index], fmean(solution.loss for solution in solutions)
        self.directory.log({**self._place(), "layer": layer, "c": c, "loss": loss, "eval": metrics})
        rank = [metrics[self.task.main_metric], -metrics["loss"]]
        return ChosenC(layer, index, c, rank if self.dev else rank[::-1], metrics, loss, solutions[0], logits)

    def _place(self) -> JsonObject:
        stage = {"stage": self.state.stage} if self.state.stage else {}
        return {**stage, "step": self.state.step, "epoch": 0.0}

    def _part(self, items: Sequence[Item]) -> Part:
        rows = features(self.live, items, self.layers, self.config.machine.max_tokens, self.folder)
        targets = [item.target for item in items]
        return Part(items, rows, self.task.rows(targets) if isinstance(self.task, LabelTask) else torch.tensor(targets))

    @torch.no_grad()
    def _logits(self, part: Part) -> Tensor:
        """What the head, in float32, says of the last layer's rows."""
        self.live.eval()
        rows = part.rows[self.layers[-1]].to(self.live.encoder.device)
        out: Tensor = self.live.head(rows)
        return out.cpu()

    def _measure(self, logits: Tensor, part: Part) -> dict[str, float]:
        """The task's metrics, and the mean loss, of logits [N, C], as ``measure`` has them."""
        metrics = self.task.metrics(self._answers(logits, part.items), [item.example for item in part.items])
        if isinstance(self.task, LabelTask):
            loss = self.task.tempered_loss(logits, [item.target for item in part.items]) / len(logits)
        else:
            loss = self._loss(logits, part)
        return {**metrics, "loss": loss}

    def _answers(self, logits: Tensor, items: Sequence[Item]) -> list[Answer]:
        pairs = zip(items, logits, strict=True)
        return [self.task.decode(item.example, item.encodings, [own]) for item, own in pairs]

    def _loss(self, logits: Tensor, part: Part) -> float:
        return float(self.task.loss(logits, [1] * len(logits), [item.target for item in part.items])) / len(logits)


def _folds(whole: Part, seed: int) -> Held:
    """Folds of items drawn by the seed, in each of which labels and scores are spread alike; of many only one."""
    count = len(whole.items)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    gold = whole.targets.argmax(1) if whole.targets.dim() > 1 else whole.targets
    order = drawn[gold[drawn].argsort(stable=True)]
    outs = (
        [order[fold::FOLDS] for fold in range(min(FOLDS, count))] if count < MANY else [order[:: round(1 / HELD_OUT)]]
    )
    folds = []
    for out in outs:
        kept = torch.ones(count, dtype=torch.bool)
        kept[out] = False
        folds.append((whole.at(kept.nonzero()[:, 0]), whole.at(out)))
    return Held(folds, whole.at(torch.cat(outs)))


def _shown(choice: ChosenC) -> JsonObject:
    return {"layer": choice.layer, "c": choice.c, "train_loss": choice.train_loss, **choice.metrics}


@torch.no_grad()
def set_head(live: TrainableDelta, solution: Solution) -> None:
    """The linear head, as it was solved."""
    linear = live.head.layers[-1].linear
    linear.weight.copy_(solution.weight)  # type: ignore[union-attr,operator]
    linear.bias.copy_(solution.bias)  # type: ignore[union-attr,operator]
