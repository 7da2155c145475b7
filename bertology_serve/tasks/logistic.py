"""Linear heads solved to their optimum in float64: logistic regression by L-BFGS, ridge regression in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import LBFGS

TIGHT, LOOSE = 1e-7, 1e-4
SMALLEST = 1e-10  # of the largest variance along an axis: below it rows do not differ
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


class Scaled:
    """The rows ``Z`` of a problem, and the way back from it.

    ``Z`` are the rows [N, H] less their mean, divided by their standard deviation: one number each over all of them
    (LP-FT's scaling), or with ``by_feature`` one a feature, 1 where it hardly varies. The solution is for rows as they
    were given. Inside, the rows are turned to their principal axes, which leaves a penalty on ‖W‖² as it is.
    """

    def __init__(self, rows: Tensor, by_feature: bool = False) -> None:
        x = rows.double()
        self.count = len(x)
        if by_feature:
            self.mean, std = x.mean(0), x.std(0, correction=0)
            self.std = torch.where(std > 1e-7, std, 1.0)
        else:
            self.mean, self.std = x.mean(), x.std(correction=0).clamp_min(1e-12)
        z = (x - self.mean) / self.std
        self.centre = z.mean(0)
        z = z - self.centre
        self.spread, self.axes = _principal_axes(z)
        self.rows = z @ self.axes

    def given(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [C, H] and bias [C] for rows as they were given."""
        weight = weight @ self.axes.T
        return weight / self.std, bias - weight @ (self.centre + self.mean / self.std)


def _principal_axes(z: Tensor) -> tuple[Tensor, Tensor]:
    """Variances [K] along the orthonormal axes [H, K] of centred rows z [N, H]; K is H, or less for fewer rows.

    An axis along which no row reaches has weight zero by the penalty, so it can be left out.
    """
    if len(z) >= z.shape[1]:
        spread, axes = torch.linalg.eigh(z.T @ z / len(z))
        return spread, axes
    spread, sides = torch.linalg.eigh(z @ z.T / len(z))
    kept = spread > SMALLEST * spread[-1].clamp_min(SMALLEST)
    return spread[kept], z.T @ (sides[:, kept] / (spread[kept] * len(z)).sqrt())


class Ridge(Scaled):
    """``min over w, b of  ½ mean (Z w + b - y)² + ‖w‖² / (2 C N)``: scikit-learn's ``Ridge(alpha=1 / C)`` on ``Z``."""

    def __init__(self, rows: Tensor, scores: Tensor) -> None:
        """rows [N, H] of any float type, scores [N]."""
        super().__init__(rows)
        self.level = scores.double().mean()
        self.scores = scores.double() - self.level

    def solve(self, c: float, start: Tensor | None = None, tolerance: float = TIGHT) -> Solution:
        """The optimum; neither a start nor a tolerance matters."""
        decay = 1.0 / (c * self.count)
        raw = (self.scores @ self.rows / self.count / (self.spread.clamp_min(0.0) + decay))[None]
        missed = self.rows @ raw[0] - self.scores
        loss = 0.5 * (missed.square().mean() + decay * raw.square().sum())
        return Solution(*self.given(raw, self.level[None]), float(loss), raw)


class Logistic(Scaled):
    """``min over W, b of  mean loss(Z Wᵀ + b) + ‖W‖² / (2 C N)``: scikit-learn's objective divided by C N.

    The loss is a softmax's cross-entropy, or with ``rest`` the sum of C binary ones (one-vs-rest).
    Two classes have one vector w, as there, and W is (-w/2, w/2). Inside, each coordinate is stretched by the curvature
    there: the number of steps hardly grows with the spread of the axes.
    """

    def __init__(self, rows: Tensor, gold: Tensor, rest: Tensor | None = None, by_feature: bool = False) -> None:
        """rows [N, H] of any float type; gold [N, C], how much each class weighs for each row (1 for its own), and rest
        [N, C], how much its not being so does.
        """
        super().__init__(rows, by_feature)
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
        weight, bias = raw[:, :-1], raw[:, -1]
        if self.halved:
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        return Solution(*self.given(weight, bias), loss, raw)
