"""``bertology-serve train-fleet``: many deltas at once, from a TOML file to their directories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bertology_serve.cli.common import load_library, note, note_next, table
from bertology_serve.errors import SpecError
from bertology_serve.training.fleet.fleet_spec import FleetSpec, read_fleet

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from bertology_serve.deltas.delta import Delta
    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.training.methods import ParameterCount


def train_fleet(
    file: Annotated[Path, typer.Argument(help="The fleet: a TOML file with [all] and one [delta.NAME] for each.")],
    out: Annotated[Path | None, typer.Option(help="The directory that the deltas will stand in.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Encoder, in place of the file's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue where an unfinished fleet stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands under the names.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the deltas and their parameters, and stop.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
) -> None:
    """Train many deltas over one frozen encoder; each gets the weights that it would have had alone."""
    spec = read_fleet(file)
    name = backbone or spec.backbone
    if name is None:
        raise SpecError(f"{file} names no backbone; give one with --backbone")
    if out is None and not dry_run:
        raise SpecError("no --out was given; say where the deltas shall stand, or look at them with --dry-run")
    load_library(backbone=name, device=device)

    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.encoder.loading import find_device
    from bertology_serve.training.fleet.fleet_directory import FleetDirectory
    from bertology_serve.training.fleet.fleet_run import train_fleet as run
    from bertology_serve.training.processes import check_alone

    check_alone("train-fleet")
    if out is not None and not dry_run:  # what is wrong there is said before anything is read
        FleetDirectory(out).check_members([one.name for one in spec.members], resume, overwrite)
    encoder = Encoder.load(name, device=find_device(device))
    if out is None or dry_run:
        show_dry_run(spec, encoder)
        return
    with Board() as board:
        deltas = run(spec, encoder, out, resume=resume, overwrite=overwrite, watcher=board)
    show(deltas)
    note(f"saved to {out}; next:")
    note_next(["serve", "--backbone", name, "--deltas", out, "--port", 8000])


class Board:
    """A table of the fleet that changes in place on a terminal, else a line an evaluation. See ``FleetWatcher``."""

    COLUMNS = ("delta", "parameters", "step", "loss", "tokens/s", "result", "state")

    def __init__(self, title: str = "fleet", ranked: bool = False, first: str = "") -> None:
        """``ranked``: the best result stands first. ``first`` is said once the data are known to be right."""
        self.title, self.ranked, self.first = title, ranked, first
        self.rows: dict[str, list[str]] = {}
        self.results: dict[str, float] = {}
        self.totals: dict[str, int] = {}
        self.losses: dict[str, float] = {}
        self.live: Live | None = None

    def __enter__(self) -> Board:
        from rich.live import Live

        from bertology_serve.cli.common import console_of

        console = console_of(stderr=True)
        if console.is_terminal:
            self.live = Live(console=console, get_renderable=self.drawn, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def drawn(self) -> Table:
        from rich.table import Table

        found = Table(*self.COLUMNS, title=self.title, title_justify="left", title_style="bold")
        order = sorted(self.rows, key=lambda name: -self.results.get(name, -1.0)) if self.ranked else self.rows
        for name in order:
            found.add_row(*self.rows[name])
        return found

    def joined(self, name: str, step: int, total: int, parameters: ParameterCount) -> None:
        if self.first:
            self._say(self.first, always=True)
        self.first = ""
        self.totals[name] = total
        self.rows[name] = [name, f"{parameters.trained:,}", f"{step}/{total}", "-", "-", "-", "waiting"]
        if step:
            self._say(f"{name}: continuing after step {step} of {total}")

    def stepped(self, name: str, line: Mapping[str, Any]) -> None:
        """Step, loss (smoothed over some twenty steps) and the fleet's speed."""
        loss = line["loss"]
        self.losses[name] = loss = 0.95 * self.losses[name] + 0.05 * loss if name in self.losses else loss
        row = self.rows[name]
        row[2:5] = [f"{line['step']}/{self.totals[name]}", f"{loss:.3f}", f"{line['tokens_per_s']:,.0f}"]
        row[6] = "training"

    def evaluated(self, name: str, line: Mapping[str, Any]) -> None:
        metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in line["eval"].items())
        self.rows[name][5] = next((f"{metric} {value:.4f}" for metric, value in line["eval"].items()), "-")
        self.results[name] = next(iter(line["eval"].values()))
        self._say(f"{name}, step {line['step']}: {metrics}")

    def failed(self, name: str, reason: str) -> None:
        self.rows[name][6] = "failed"
        self._say(f"{name}: given up at {reason}", always=True)

    def dropped(self, name: str, step: int) -> None:
        self.rows[name][6] = "dropped"
        self._say(f"{name}: dropped after step {step}")

    def published(self, name: str, difference: float) -> None:
        self.rows[name][6] = "saved"
        self._say(f"{name}: saved; the saved copy differs by {difference:.1e}")

    def noted(self, text: str) -> None:
        self._say(text, always=True)

    def _say(self, text: str, always: bool = False) -> None:
        if self.live is None:
            note(text)
        elif always:
            self.live.console.print(text)


def show_dry_run(spec: FleetSpec, encoder: Encoder) -> None:
    """What would be trained, and nothing else."""
    from bertology_serve.training.fleet.fleet_run import Shelf, enrol
    from bertology_serve.training.methods import count_parameters

    rows = []
    for one in enrol(spec, Shelf(encoder)):
        member, count = one.member, count_parameters(one.member.live)
        about = [member.config.task, ",".join(member.config.method), f"{count.delta:,}", f"{count.head:,}"]
        rows.append([member.name, *about, len(member.items), member.total])
    columns = ["delta", "task", "method", "parameters", "of the head", "rows", "steps"]
    table(f"would train {len(rows)} deltas together", columns, rows, stderr=False)


def show(deltas: Mapping[str, Delta]) -> None:
    """The deltas and their metrics."""
    rows = []
    for name, delta in deltas.items():
        metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in delta.metrics.items())
        kept, count = delta.provenance["kept"], delta.provenance["trained_parameters"]
        rows.append([name, " + ".join(delta.kinds), f"{count:,}", kept, metrics])
    table("fleet", ["delta", "kind", "parameters", "kept", "metrics"], rows, stderr=False)
