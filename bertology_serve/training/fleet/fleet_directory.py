"""What an unfinished fleet needs to continue, hidden where its deltas will stand; and what it tells whoever watches.

``OUT/.fleet/`` holds ``run.json`` (what the fleet is), ``checkpoint.safetensors`` (where all of it stands: one file, so
that the members are always at the steps that they had together) and ``NAME.log.jsonl`` for each member. It goes when
the last delta is published; each log goes into its delta's directory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from bertology_serve.deltas.catalog import check_place
from bertology_serve.errors import InputError
from bertology_serve.files import JsonObject
from bertology_serve.training.methods import ParameterCount
from bertology_serve.training.run_directory import LOG, RunDirectory, read_checkpoint
from bertology_serve.training.trainer import Line

Stored = tuple[dict[str, Tensor], JsonObject]


class FleetDirectory(RunDirectory):
    """The fleet whose deltas will be ``root/NAME``; it works in ``path``."""

    def __init__(self, root: Path, path: Path | None = None) -> None:
        super().__init__(root)
        self.root, self.path = root, path or root / ".fleet"

    def check_members(self, names: Iterable[str], resume: bool, overwrite: bool) -> None:
        """Raises InputError where a delta, another thing of its name, or an unfinished fleet is in the way, or a delta
        would not be found.
        """
        if resume and self.unfinished:  # what stands there may be its own
            return
        for name in names:
            check_place(self.root / name, name)
            RunDirectory(self.root / name).check_free(False, overwrite)
        if self.unfinished and not overwrite:
            raise InputError(
                f"an unfinished fleet lies in {self.path}; continue it with --resume, or discard it with --overwrite"
            )

    def sweep(self, names: Iterable[str]) -> None:
        """Removes what a process that was killed while it published left beside the deltas."""
        for name in names:
            for path in [*self.root.glob(f".{name}.*.tmp"), *self.root.glob(f".{name}.*.old")]:
                shutil.rmtree(path, ignore_errors=True)

    def log_of(self, name: str, record: Line) -> None:
        with self._log_path(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def lines_of(self, name: str) -> list[JsonObject]:
        path = self._log_path(name)
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def take_log(self, name: str) -> Path:
        """The member's log under the name that it has beside a delta."""
        place = self.path / name / LOG
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(self._log_path(name).read_bytes() if self._log_path(name).exists() else b"")
        return place

    def save_all(self, members: Mapping[str, Stored], tensors: Mapping[str, Tensor]) -> None:
        """Writes the checkpoint: what each member stores, and the fleet's own tensors."""
        flat = {f"{name}/{key}": tensor for name, (own, _) in members.items() for key, tensor in own.items()}
        self.save(flat | dict(tensors), {name: state for name, (_, state) in members.items()})

    def load_all(self, names: Iterable[str]) -> tuple[dict[str, Stored], dict[str, Tensor]] | None:
        """The inverse of ``save_all``; logs are cut back to it. ``None``: begin at the first step."""
        found = read_checkpoint(self._checkpoint) if self._checkpoint.exists() else None
        for name in names:
            self._cut(name, found[1][name]["run"]["step"] if found else -1)  # step 0 has a line where it is measured
        if found is None:
            return None
        members: dict[str, Stored] = {name: ({}, state) for name, state in found[1].items()}
        own: dict[str, Tensor] = {}
        for key, tensor in found[0].items():
            name, slash, rest = key.partition("/")
            if slash:
                members[name][0][rest] = tensor
            else:
                own[key] = tensor
        return members, own

    def _log_path(self, name: str) -> Path:
        return self.path / f"{name}.{LOG}"

    def _cut(self, name: str, step: int) -> None:
        path = self._log_path(name)
        if path.exists():
            whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step), encoding="utf-8")


class FleetWatcher(Protocol):
    """Sees the members of a fleet from outside, by name; see ``Trainer`` for what the lines hold."""

    def joined(self, name: str, step: int, total: int, parameters: ParameterCount) -> None:
        """A member begins after ``step`` of ``total`` steps."""
        return

    def stepped(self, name: str, line: Line) -> None:
        """A member made a step."""
        return

    def evaluated(self, name: str, line: Line) -> None:
        """A member answered its evaluation data."""
        return

    def failed(self, name: str, reason: str) -> None:
        """A member was given up; the others go on."""
        return

    def dropped(self, name: str, step: int) -> None:
        """A member ends after that step, because others are better."""
        return

    def published(self, name: str, difference: float) -> None:
        """A member's delta stands in its place; its saved copy differs by so much."""
        return

    def noted(self, text: str) -> None:
        """Something to know before training begins."""
        return


class Quiet(FleetWatcher):
    """Watches nothing."""
