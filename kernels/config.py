"""How a launch of a matrix kernel is cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """How one launch of a matrix kernel is cut.

    ``block_m``, ``block_n``, ``block_k``: the tile; ``rank_tile`` RT: rank columns per matrix instruction group;
    ``sweep`` q: N tiles that one program computes with the same xA (1: recomputed by every program); ``tma``: x and W
    are read through tensor descriptors (Hopper and later).
    """

    block_m: int = 64
    block_n: int = 64
    block_k: int = 32
    rank_tile: int = 16
    sweep: int = 1
    warps: int = 4
    stages: int = 2
    tma: bool = False


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
