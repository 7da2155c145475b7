"""Launch configurations by rule, for shapes that nobody has measured: the committed tables start from these.

The rules follow a roofline model: one program per SM and more where the batch allows it; recomputing xA in every N tile
costs RT / BN of the base product, so it pays while RT · N < 184 · q · BN (184 FLOP per byte of HBM on an H100), and
beyond that a separate shrink whose coefficients are read is cheaper.
"""

from __future__ import annotations

from bertology_serve.kernels.config import Config, cdiv

FUSED, SPLIT, TORCH = "fused", "split", "torch"
RANK_TILES = (16, 32, 64)
FLOP_PER_BYTE = 184
MANY_ROWS, SOME_ROWS, FEW_ROWS = 8192, 2048, 256


def rank_tile(columns: int) -> int:
    """RT: the smallest of 16, 32 and 64 that holds so many columns; more are done in chunks of 64."""
    return next((tile for tile in RANK_TILES if columns <= tile), RANK_TILES[-1])


def by_rule(arch: str, half: bool, k: int, n: int, rows: int, columns: int) -> tuple[str, Config]:
    """(form, configuration) for x [rows, k], one slice of width n, and so many rank columns in a tile."""
    config = _hopper(k, n, rows, columns) if arch == "sm_90" and half else _ampere(half, k, n, rows, columns)
    if columns == 0:
        return TORCH, config  # cuBLAS has nothing to add
    small_enough = config.rank_tile * n < FLOP_PER_BYTE * config.sweep * config.block_n
    one_chunk = columns <= config.rank_tile
    return (FUSED if one_chunk and (small_enough or rows <= SOME_ROWS) else SPLIT), config


def _hopper(k: int, n: int, rows: int, columns: int) -> Config:
    rank = rank_tile(columns)
    if rows <= FEW_ROWS:
        return Config(64, 32 if n <= 1024 else 64, 64, rank, 1, 4, 4, True)
    if rows <= SOME_ROWS:
        return Config(64, 128, 64, rank, 1, 4, 4 if rank < 64 else 3, True)
    if rows <= MANY_ROWS:
        return Config(128, 128, 64, rank, 1, 4 if rank < 64 else 8, 3, True)
    return Config(128, 128, 64, rank, _sweep(n, 128) if columns else 1, 8, 3, True)


def _ampere(half: bool, k: int, n: int, rows: int, columns: int) -> Config:
    rank = min(rank_tile(columns), 32)
    if not half:
        return Config(64, 64, 16, rank, 1, 4, 2)
    if rows <= SOME_ROWS:
        return Config(64, 64, 32, rank, 1, 4, 3)
    return Config(128, 128, 32, rank, 1, 8, 3)


def _sweep(n: int, block_n: int) -> int:
    """q: as many N tiles as a program may keep xA for, 4 at most, dividing their number."""
    tiles = cdiv(n, block_n)
    return next(q for q in (4, 3, 2, 1) if tiles % q == 0)


def adapter_config(half: bool) -> Config:
    """Of bottleneck adapters: memory-bound, so tiles as high as registers allow, for fewer reads of D and U."""
    return Config(64, 64, 64, 64, 1, 4, 3) if half else Config(32, 32, 16, 64, 1, 8, 2)
