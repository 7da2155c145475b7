"""The grids that come with the package. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from bertology_serve.errors import NotFound, nearest
from bertology_serve.training.grids.grid import Grid, read_grid

FOLDER = Path(__file__).parent / "presets"


def presets() -> dict[str, Path]:
    """The packaged grids by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def find_grid(name: str) -> Grid:
    """A packaged grid by its name, or any other from its file. Raises NotFound, SpecError."""
    known = presets()
    if name in known:
        return read_grid(known[name])
    if not name.endswith(".toml"):
        raise NotFound(f"no grid {name!r}; {nearest(name, known)} (or a TOML file)")
    return read_grid(Path(name))
