"""How alike heads attend: Jensen-Shannon divergences, clusters of them, and a map in two dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class Divergences:
    """Mean Jensen-Shannon divergence, in bits, of every two heads' attention over the rows seen (Clark et al. 2019).

    JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2, between 0 and 1.
    """

    def __init__(self, heads: int) -> None:
        self.sums = torch.zeros(heads, heads, dtype=torch.float64)
        self.rows = 0

    def add(self, maps: Iterable[Tensor]) -> None:
        """The maps [heads, n, keys] of each layer for the same n rows."""
        attention = torch.cat(list(maps))  # [all heads, n, keys]
        entropies = torch.special.entr(attention).sum(-1)  # [all heads, n]
        for head in range(len(attention) - 1):
            mixed = torch.special.entr((attention[head] + attention[head + 1 :]) / 2).sum(-1)
            apart = mixed - (entropies[head] + entropies[head + 1 :]) / 2
            self.sums[head, head + 1 :] += apart.double().sum(-1).cpu()
        self.rows += attention.shape[1]

    def means(self) -> np.ndarray:
        """[heads, heads], symmetric, zero on the diagonal."""
        half = self.sums.clamp(min=0) / (max(1, self.rows) * math.log(2))
        return (half + half.T).numpy()


def clusters(distances: np.ndarray, count: int) -> list[int]:
    """Average-linkage clusters of points, given their distances [n, n]: a number each, the largest cluster is 0."""
    between = distances.astype(float).copy()
    np.fill_diagonal(between, np.inf)
    members: dict[int, list[int]] = {i: [i] for i in range(len(distances))}
    while len(members) > max(1, count):
        i, j = sorted(divmod(int(np.argmin(between)), len(between)))
        a, b = len(members[i]), len(members[j])
        between[i] = between[:, i] = (a * between[i] + b * between[j]) / (a + b)
        between[j] = between[:, j] = between[i, i] = np.inf
        members[i] += members.pop(j)
    labels = [0] * len(distances)
    for number, cluster in enumerate(sorted(members.values(), key=lambda points: (-len(points), min(points)))):
        for point in cluster:
            labels[point] = number
    return labels


def flat_map(distances: np.ndarray) -> np.ndarray:
    """Classical multidimensional scaling: points [n, 2] whose distances come near those given."""
    n = len(distances)
    centre = np.eye(n) - 1.0 / n
    values, vectors = np.linalg.eigh(-0.5 * centre @ np.square(distances) @ centre)
    points = vectors[:, ::-1][:, :2] * np.sqrt(np.clip(values[::-1][:2], 0, None))
    signs = np.sign(points[np.abs(points).argmax(0), range(points.shape[1])])
    return points * np.where(signs == 0, 1, signs)  # type: ignore[no-any-return]
