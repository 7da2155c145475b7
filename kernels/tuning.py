"""Launch configurations: the committed tuning tables (``tuning.sm_90.json``), and the rules that they start from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Config:
    """How one launch of a matrix kernel is cut.

    ``block_m``, ``block_n``, ``block_k``: the tile; ``rank_tile`` RT: rank columns per matrix instruction group;
    ``sweep`` q: N tiles that one program computes with the same xA (1: recomputed by every program); ``tma``: x and W
    are read through tensor descriptors (Hopper and later); ``persistent``: as many programs as multiprocessors walk
    over all tiles.
    """

    block_m: int = 64
    block_n: int = 64
    block_k: int = 32
    rank_tile: int = 16
    sweep: int = 1
    warps: int = 4
    stages: int = 2
    tma: bool = False
    persistent: bool = False


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


FILLED = 132
"""Programs that fill a GPU: the multiprocessors of an H100 and H200. An A100's 108 and an L40S's 142 are near."""
FUSED, SPLIT, TORCH = "fused", "split", "torch"
RANK_TILES = (16, 32, 64)
FLOP_PER_BYTE = 184
SOME_ROWS, FEW_ROWS = 2048, 256


def rank_tile(columns: int) -> int:
    """RT: the smallest of 16, 32 and 64 that holds so many columns; more are done in chunks of 64."""
    return next((tile for tile in RANK_TILES if columns <= tile), RANK_TILES[-1])


def by_rule(arch: str, half: bool, k: int, n: int, rows: int, columns: int) -> tuple[str, Config]:
    """(form, configuration) for x [rows, k], one slice of width n, and so many rank columns in a tile."""
    config = _hopper(k, n, rows, columns) if arch == "sm_90" and half else _ampere(half, k, n, rows, columns)
    if columns == 0:
        return TORCH, config  # cuBLAS has nothing to add
    few_reads = arch != "sm_90" and config.rank_tile * n < FLOP_PER_BYTE * config.block_n
    return (FUSED if columns <= config.rank_tile and (few_reads or rows <= SOME_ROWS) else SPLIT), config


def _hopper(k: int, n: int, rows: int, columns: int) -> Config:
    rank = rank_tile(columns)
    if rows <= FEW_ROWS:
        return Config(64, 32 if n <= 1024 else 64, 64, rank, 1, 4, 4, True)
    if rows <= SOME_ROWS:
        return Config(64, 128, 64, rank, 1, 4, 4 if rank < 64 else 3, True)
    return Config(128, 256, 64, rank, 1, 8, 3, True, persistent=True)


def _ampere(half: bool, k: int, n: int, rows: int, columns: int) -> Config:
    rank = min(rank_tile(columns), 32)
    if not half:
        return Config(64, 64, 16, rank, 1, 4, 2)
    if rows <= SOME_ROWS:
        return Config(64, 64, 32, rank, 1, 4, 3)
    return Config(128, 128, 32, rank, 1, 8, 3)


def adapter_config(half: bool) -> Config:
    """Of bottleneck adapters: memory-bound, so tiles as high as registers allow, for fewer reads of D and U."""
    return Config(64, 64, 64, 64, 1, 4, 3) if half else Config(32, 32, 16, 64, 1, 8, 2)


FORMS = (FUSED, SPLIT, TORCH)
SHAPES = ((768, 768), (768, 2304), (768, 3072), (3072, 768), (1024, 1024), (1024, 3072), (1024, 4096), (4096, 1024))
"""(K, N) of BERT-base and BERT-large: one projection, packed QKV (three slices), FFN up and down."""
ROWS = (128, 1024, 4096, 16384, 65536)
COLUMNS = (0, 16, 32, 64, 128)
DTYPES = ("half", "float")


@dataclass(frozen=True)
class Point:
    """What a configuration is looked up by: ``columns`` is the typical number of rank columns in a tile."""

    dtype: str
    k: int
    n: int
    slices: int
    rows: int
    columns: int

    def distance(self, other: Point) -> float:
        """How far apart two points are, in powers of two; the dtype and the slices must be the same."""
        if (self.dtype, self.slices) != (other.dtype, other.slices) or (self.columns == 0) != (other.columns == 0):
            return math.inf
        pairs = ((self.k, other.k), (self.n, other.n), (self.rows, other.rows), (self.columns, other.columns))
        return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)


@dataclass(frozen=True)
class Row:
    """One line of a table: at this point, this form with this configuration."""

    point: Point
    form: str
    config: Config


KEYS = [*(f.name for f in fields(Point)), "form", *(f.name for f in fields(Config))]


@dataclass(frozen=True)
class Table:
    """One architecture's rows; ``measured`` is empty for a table that no GPU has seen."""

    arch: str
    rows: tuple[Row, ...]
    measured: Mapping[str, str] = field(default_factory=dict)

    def nearest(self, point: Point) -> Row:
        """The row nearest to a point; the first of equals. Raises ValueError where none has its dtype and slices."""
        best = min(self.rows, key=lambda row: row.point.distance(point), default=None)
        if best is None or math.isinf(best.point.distance(point)):
            raise ValueError(f"got {point}, which the table of {self.arch} has no row for; write one with --tune")
        return best

    def save(self, path: Path) -> None:
        """Writes the table as JSON, a row per line, so that a new measurement is a readable diff."""
        head = json.dumps({"arch": self.arch, "measured": dict(self.measured), "keys": KEYS})[:-1]
        lines = ",\n".join(json.dumps([_flat(row)[key] for key in KEYS], separators=(",", ":")) for row in self.rows)
        path.write_text(f'{head}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def path_of(arch: str) -> Path:
    """Where the table of an architecture is kept."""
    return Path(__file__).with_name(f"tuning.{arch}.json")


@cache
def table(arch: str) -> Table:
    """The committed table of an architecture. Raises ValueError where a row of it makes no sense."""
    return read(path_of(arch))


def read(path: Path) -> Table:
    """A table from a file; raises ValueError naming the line that makes no sense."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["keys"] != KEYS:
        raise ValueError(f"{path.name}: got the keys {data['keys']}, expected {KEYS}; write it again with --tune")
    return Table(data["arch"], tuple(_row(path, i, values) for i, values in enumerate(data["rows"])), data["measured"])


def by_rules(arch: str) -> Table:
    """The table that the heuristics give for every shape of BERT-base and -large."""
    rows = []
    for point in points():
        form, config = by_rule(arch, point.dtype == "half", point.k, point.n // point.slices, point.rows, point.columns)
        rows.append(Row(point, form, config))
    return Table(arch, tuple(rows))


def points() -> Iterable[Point]:
    """Every point that a table has a row for."""
    for dtype in DTYPES:
        for k, n in SHAPES:
            for rows in ROWS:
                for columns in COLUMNS:
                    yield Point(dtype, k, n, 1, rows, columns)
                    if n == 3 * k:
                        yield Point(dtype, k, n, 3, rows, columns)


def _flat(row: Row) -> dict[str, object]:
    return {**asdict(row.point), "form": row.form, **asdict(row.config)}


def _row(path: Path, number: int, values: list[Any]) -> Row:
    flat = dict(zip(KEYS, values, strict=False))
    if len(values) != len(KEYS) or flat["form"] not in FORMS:
        raise ValueError(f"{path.name}, row {number}: got {values}, expected {len(KEYS)} values and a form of {FORMS}")
    point = Point(**{f.name: flat[f.name] for f in fields(Point)})
    return Row(point, flat["form"], Config(**{f.name: flat[f.name] for f in fields(Config)}))
