"""The linear probe solved to its optimum on features of one pass: L-BFGS in float64 over a path of C."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import LBFGS

from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.tasks.classification import LabelTask
from bertology_serve.tasks.spec import MULTI_LABEL
from bertology_serve.training.batches import Item
from bertology_serve.training.callbacks import Callback, NoCallback
from bertology_serve.training.checkpoint import RunState
from bertology_serve.training.features import Features, features
from bertology_serve.training.methods import count_parameters
from bertology_serve.training.run_directory import RunDirectory
from bertology_serve.training.train_config import TrainConfig

TIGHT, LOOSE = 1e-7, 1e-4
STEPS_A_ROUND, MOST_ROUNDS = 1000, 10


@dataclass(frozen=True)
class Solution:
    """``weight`` [C, H] and ``bias`` [C], float64, for rows as they were given; ``loss`` is the objective reached.

    ``raw`` is the same in the solver's own coordinates, from which a neighbouring problem may start.
    """

    weight: Tensor
    bias: Tensor
    loss: float
    raw: Tensor

    def logits(self, rows: Tensor) -> Tensor:
        """rows [N, H] -> [N, C], float64."""
        return rows.double() @ self.weight.T + self.bias


class Logistic:
    """``min over W, b of  mean loss(Z Wᵀ + b) + ‖W‖² / (2 C N)``: scikit-learn's objective divided by C N.

    ``gold`` [N, C] are the weights of the classes (1 for an example's own), and the loss is their cross-entropy.
    With ``rest`` [N, C], the weights of not being each class, it is the sum of C binary ones: one-vs-rest.
    ``Z`` are the rows [N, H] less their mean, divided by their standard deviation (one number each, over all of them:
    LP-FT's scaling, folded back into the solution). Two classes have one vector w, as there, and W is (-w/2, w/2).
    Inside, the rows are turned to their principal axes, which leaves the penalty as it is, and each coordinate is
    stretched by the curvature there: the number of steps hardly grows with the spread of the axes.
    """

    def __init__(self, rows: Tensor, gold: Tensor, rest: Tensor | None = None) -> None:
        x = rows.double()
        self.count = len(x)
        self.mean, self.std = x.mean(), x.std(correction=0).clamp_min(1e-12)
        z = (x - self.mean) / self.std
        self.centre = z.mean(0)
        z = z - self.centre
        self.axes = torch.linalg.eigh(z.T @ z / self.count).eigenvectors
        self.rows = z @ self.axes
        self.squares = self.rows.square()
        self.halved = rest is None and gold.shape[1] == 2
        self.gold, self.rest = (gold[:, 1:], gold[:, :1]) if self.halved else (gold, rest)
        self.weights = self.gold.sum(1, keepdim=True) if self.rest is None else self.gold + self.rest

    def solve(self, c: float, start: Tensor | None = None, tolerance: float = TIGHT) -> Solution:
        """The optimum, where no component of the (preconditioned) gradient exceeds ``tolerance``."""
        decay = 1.0 / (c * self.count)
        raw = self.rows.new_zeros(self.gold.shape[1], self.rows.shape[1] + 1) if start is None else start
        for _ in range(MOST_ROUNDS):
            raw, done = self._round(raw, decay, tolerance)
            if done:
                break
        return self._folded(raw, float(self._objective(raw, decay)[0]))

    def _round(self, raw: Tensor, decay: float, tolerance: float) -> tuple[Tensor, bool]:
        """L-BFGS from ``raw``, each coordinate stretched by its curvature there; and whether it is done."""
        scale = self._curvature(raw, decay).rsqrt()
        scaled = torch.nn.Parameter(raw / scale)

        def closure() -> Tensor:
            loss, gradient = self._objective(scaled.detach() * scale, decay)
            scaled.grad = gradient * scale
            return loss

        optimizer = LBFGS(
            [scaled],
            max_iter=STEPS_A_ROUND,
            max_eval=25 * STEPS_A_ROUND,
            tolerance_grad=tolerance,
            tolerance_change=1e-16,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return scaled.detach() * scale, optimizer.state[scaled]["n_iter"] < STEPS_A_ROUND

    def _logits(self, raw: Tensor) -> Tensor:
        """[N, C or 1]."""
        logits: Tensor = self.rows @ raw[:, :-1].T + raw[:, -1]
        return logits

    def _curvature(self, raw: Tensor, decay: float) -> Tensor:
        """The diagonal of the Hessian at ``raw``, [H + 1].

        Its mean over the classes: with a scale of their own they would leave the plane where their sum is zero, in
        which the optimum of a softmax lies and outside of which the objective is all but flat.
        """
        logits = self._logits(raw)
        shares = logits.softmax(1) if self.rest is None else logits.sigmoid()
        spread = (self.weights * shares * (1.0 - shares)).mean(1) / self.count
        return torch.cat([spread @ self.squares + decay, spread.sum()[None].clamp_min(1e-12)])

    def _objective(self, raw: Tensor, decay: float) -> tuple[Tensor, Tensor]:
        """The objective and its gradient at ``raw`` [C or 1, H + 1], the bias last."""
        weight, logits = raw[:, :-1], self._logits(raw)
        if self.rest is None:
            logs = logits.log_softmax(1)
            terms, shares = self.gold * logs, logs.exp()
        else:
            terms, shares = self.gold * F.logsigmoid(logits) + self.rest * F.logsigmoid(-logits), logits.sigmoid()
        loss = -terms.sum() / self.count + 0.5 * decay * weight.square().sum()
        missed = (shares * self.weights - self.gold) / self.count
        return loss, torch.cat([missed.T @ self.rows + decay * weight, missed.sum(0)[:, None]], 1)

    def _folded(self, raw: Tensor, loss: float) -> Solution:
        """Back to rows as they were given."""
        weight, bias = raw[:, :-1] @ self.axes.T, raw[:, -1]
        if self.halved:
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        bias = bias - weight @ (self.centre + self.mean / self.std)
        return Solution(weight / self.std, bias, loss, raw)


HELD_OUT = 0.1


@dataclass(frozen=True)
class Part:
    """Some items, their features by layer, and their targets' weights, float64 [N, C] (multi-label: [N, 2 C])."""

    items: Sequence[Item]
    rows: Features
    weights: Tensor


@dataclass(frozen=True)
class Choice:
    """The value of C that did best on one layer, and how: ``rank`` is the main metric, then the negative loss."""

    layer: int
    index: int
    c: float
    rank: list[float]
    metrics: dict[str, float]
    solution: Solution


class Solver:
    """Solves a live probe for every C of a path from 1e-7 to 1e2 (LP-FT's), each from the one before.

    C is chosen on ``dev`` items or, without any, on a tenth of the items that is held out; the probe is then solved
    tightly for that C on all items. Every C is a log line ``{step, epoch, layer, c, loss, eval}``, ``loss`` the
    objective reached. With all layers each gets a probe of its own from the same pass; the last one's is the live
    delta's, and ``layers.json`` says how the others do. It is deterministic and short: one that was interrupted begins
    again, on the features that were kept.
    """

    def __init__(
        self,
        live: TrainableDelta,
        task: LabelTask,
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
        if config.lp_layers == "all":
            live.encoder.check_layers("a probe of each layer")
        self.layers = tuple(range(depth + 1)) if config.lp_layers == "all" else (depth,)
        self.path = torch.logspace(-7, 2, config.lp_path, dtype=torch.float64).tolist()

    def run(self) -> RunState:
        """Solves; the live delta's head then holds the last layer's probe."""
        started, state = time.perf_counter(), self.state
        self.directory.load(state.stage)
        self.watcher.began(0, len(self.path) * len(self.layers), count_parameters(self.live))
        whole = self._part(self.items)
        fit, held = (whole, self._part(self.dev)) if self.dev else _split(whole, self.config.seed)
        choices = [self._choose(layer, fit, held) for layer in self.layers]
        best, last = choices[-1], self.layers[-1]
        problem = self._problem(whole, last)
        self._set(problem.solve(best.c, best.solution.raw if self.dev else None))
        state.best, state.best_step = best.rank, state.step - len(self.path) + best.index + 1
        state.metrics = self._measure(self._logits(held), held) if self.dev else {}
        state.seconds += time.perf_counter() - started
        if len(choices) > 1:
            self.directory.write_layers([_shown(choice) for choice in choices])
        return state

    def _choose(self, layer: int, fit: Part, held: Part) -> Choice:
        """The best C of the path for one layer."""
        found = [self._tried(layer, index, solution, held) for index, solution in self._solutions(layer, fit)]
        best = max(found, key=lambda choice: (choice.rank, -choice.index))
        metrics = self._measure(best.solution.logits(held.rows[layer]).float(), held)
        self.watcher.evaluated({**self._place(), "layer": layer, "c": best.c, "eval": metrics})
        return replace(best, metrics=metrics)

    def _solutions(self, layer: int, fit: Part) -> Iterator[tuple[int, Solution]]:
        problem, start = self._problem(fit, layer), None
        for index, c in enumerate(self.path):
            solution = problem.solve(c, start, LOOSE)
            start = solution.raw
            yield index, solution

    def _problem(self, part: Part, layer: int) -> Logistic:
        several = self.task.kind == MULTI_LABEL
        sides = part.weights.chunk(2, 1) if several else (part.weights, None)
        return Logistic(part.rows[layer], *sides)

    def _tried(self, layer: int, index: int, solution: Solution, held: Part) -> Choice:
        logits = solution.logits(held.rows[layer])
        main = self.task.quick(logits, held.weights)
        metrics = {self.task.main_metric: main, "loss": self._loss(logits, held)}
        self.state.step += 1
        about = {"layer": layer, "c": self.path[index], "loss": solution.loss, "eval": metrics}
        self.directory.log({**self._place(), **about})
        return Choice(layer, index, self.path[index], [main, -metrics["loss"]], metrics, solution)

    def _place(self) -> dict[str, Any]:
        stage = {"stage": self.state.stage} if self.state.stage else {}
        return {**stage, "step": self.state.step, "epoch": 0.0}

    def _part(self, items: Sequence[Item]) -> Part:
        rows = features(self.live, items, self.layers, self.config.max_tokens, self.folder)
        return Part(items, rows, self.task.rows([item.target for item in items]))

    @torch.no_grad()
    def _set(self, solution: Solution) -> None:
        linear = self.live.head.layers[-1].linear
        linear.weight.copy_(solution.weight)  # type: ignore[union-attr,operator]
        linear.bias.copy_(solution.bias)  # type: ignore[union-attr,operator]
        self.live.eval()

    @torch.no_grad()
    def _logits(self, part: Part) -> Tensor:
        """What the head, in float32, says of the last layer's rows."""
        rows = part.rows[self.layers[-1]].to(self.live.encoder.device)
        out: Tensor = self.live.head(rows)
        return out.cpu()

    def _measure(self, logits: Tensor, part: Part) -> dict[str, float]:
        """The task's metrics, and the mean loss, of logits [N, C]."""
        answers = [
            self.task.decode(item.example, item.encodings, [own]) for item, own in zip(part.items, logits, strict=True)
        ]
        metrics = self.task.metrics(answers, [item.example for item in part.items])
        return {**metrics, "loss": self._loss(logits, part)}

    def _loss(self, logits: Tensor, part: Part) -> float:
        return float(self.task.loss(logits, [], [item.target for item in part.items])) / len(part.items)


def _split(whole: Part, seed: int) -> tuple[Part, Part]:
    """All but a tenth, and that tenth, drawn by the seed."""
    order = torch.randperm(len(whole.items), generator=torch.Generator().manual_seed(seed))
    count = max(1, round(HELD_OUT * len(order)))
    return _chosen(whole, order[count:]), _chosen(whole, order[:count])


def _chosen(part: Part, at: Tensor) -> Part:
    rows = {layer: rows[at] for layer, rows in part.rows.items()}
    return Part([part.items[i] for i in at.tolist()], rows, part.weights[at])


def _shown(choice: Choice) -> dict[str, Any]:
    return {"layer": choice.layer, "c": choice.c, "train_loss": choice.solution.loss, **choice.metrics}
