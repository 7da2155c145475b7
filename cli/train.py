"""``bertology-serve train``: one delta, from a file of records to a directory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bertology_serve.cli.common import load_library, note, note_next, progress, table
from bertology_serve.cli.options import from_file, from_set, laid_out, listed, options
from bertology_serve.errors import SpecError
from bertology_serve.training.method_options import AUTO, KindFlags
from bertology_serve.training.train_config import TrainConfig

if TYPE_CHECKING:
    from bertology_serve.deltas.delta import Delta
    from bertology_serve.encoder.trainable import TrainableDelta
    from bertology_serve.training.batches import Source
    from bertology_serve.training.methods import ParameterCount
    from bertology_serve.training.processes import Processes
    from bertology_serve.training.recipes import Stage
    from bertology_serve.training.train import Outcome


COMMON = (
    "backbone", "train", "eval", "out", "data", "task", "labels", "max_length", "method", "budget", "rank", "recipe",
    "epochs", "batch_size", "learning_rate", "seed", "device",
)  # fmt: skip
PANELS = {
    "Data and delta": ("backbone", "train", "eval", "ood", "out", "columns", "name", "version", "data"),
    "Task": (),
    "Method": tuple(flag.name for flag in fields(KindFlags)),
    "Optimisation": (),
    "Evaluation and state": ("resume", "overwrite"),
    "Machine": ("device", "prepack"),
    "Reports": ("dry_run", "plot", "tensorboard"),
}

MOST_NAMED = 10
BEGAN = {"contrastive": "contrastive start", "probe": "probe (contrastive start: no better)"}


@laid_out(COMMON, PANELS)
@options(KindFlags, into="kinds")
@options(TrainConfig, skip=("options",))
def train(
    backbone: Annotated[str, typer.Option(help="Encoder: a hub id, a directory, or minilm.")],
    train: Annotated[str, typer.Option(help="Records: .jsonl, .csv, .tsv (also .gz), .parquet, or hub:NAME.")],
    eval: Annotated[str | None, typer.Option(help="Records to measure on; they choose the state that is kept.")] = None,
    ood: Annotated[str | None, typer.Option(help="Records of another domain; they choose nothing.")] = None,
    out: Annotated[Path | None, typer.Option(help="The delta's directory.")] = None,
    columns: Annotated[str | None, typer.Option(help="Where fields stand: text=sentence,label=y.")] = None,
    name: Annotated[str | None, typer.Option(help="The delta's name. Default: that of --out.")] = None,
    version: Annotated[str | None, typer.Option(help="Write OUT/VERSION instead of OUT itself.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue where an unfinished run stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands at --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count parameters and memory, and stop.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw curve.png into the delta's directory.")] = False,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard's event files.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    prepack: Annotated[
        bool | None, typer.Option(help="Lay frozen linears out for oneDNN (CPU). Default: where a timing says so.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--config", is_eager=True, callback=from_file, help="TOML with flags, such as a run's config.toml."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(is_eager=True, callback=from_set, help="A known set: glue/mrpc, or the folder that holds it."),
    ] = None,
    *,
    config: TrainConfig,
    kinds: KindFlags,
) -> None:
    """Train one delta; it is saved once the saved copy has given the same answers."""
    config = config.replaced(options=kinds.by_kind())
    if out is None and not dry_run:
        raise SpecError("no --out was given; say where the delta shall lie, or count its parameters with --dry-run")
    load_library(data=[train, eval, ood], backbone=backbone, device=device)

    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.encoder.loading import find_device
    from bertology_serve.tasks.base import make_items
    from bertology_serve.tasks.fields import unnamed_labels
    from bertology_serve.tasks.registry import task_for
    from bertology_serve.tasks.spec import MULTI_LABEL
    from bertology_serve.training import train as training
    from bertology_serve.training.batches import Data, Source
    from bertology_serve.training.methods import count_parameters, make_live
    from bertology_serve.training.plots import check_plots, draw_curve
    from bertology_serve.training.processes import check_alone, join
    from bertology_serve.training.recipes import stages
    from bertology_serve.training.run_directory import Destination
    from bertology_serve.training.trainer import CallbackList

    place = Destination(out or Path("dry-run"), name, version, resume, overwrite)
    if plot:
        check_plots()
    if not dry_run:
        place.open()  # what is wrong there is said before anything is read
    source = Source.read(train, read_columns(columns))
    dev, other = (Source.read(path, read_columns(columns)) if path else None for path in (eval, ood))
    config = training.for_data(given := config, source)
    if config.task != given.task:
        note(f"labels are lists: the task is {config.task}")
    read = training.usable(config, Data(source, dev, other))
    source, dev, other = read.train, read.dev, read.ood
    if read.skipped:
        note(f"skipped {len(read.skipped):,} records" + ("" if dry_run else ", which skipped.txt in --out names") + ":")
    for why in read.skipped[:MOST_NAMED]:
        note(f"  {why}")
    if config.task == MULTI_LABEL and not config.form.labels and (count := unnamed_labels(source.records)):
        note(
            f"labels are lists of {count} numbers without names, which are called 0 to {count - 1}: give --labels, in "
            "their order, or keep each in a column of its own, --columns 'label=FIRST|SECOND'"
        )
    processes, own_device = join(find_device(device))
    encoder = Encoder.load(backbone, device=own_device)
    if dry_run:
        spec = training.task_spec(config, encoder, source)
        for own in (source, dev, other):
            items = make_items(task_for(spec), own.records, encoder.tokenizer) if own else []
            if own:
                note(f"{own.name}: {len(items):,} records, none of them wrong")
        if AUTO in config.method:
            from bertology_serve.training.auto import candidates

            tried = candidates(config, encoder, len(source.records))
            counts = {name: count_parameters(make_live(encoder, own, spec)) for name, own in tried.items()}
            rows = [[name, ",".join(tried[name].method), f"{own.trained:,}"] for name, own in counts.items()]
            table(f"would try {len(rows)} candidates", ["candidate", "method", "parameters"], rows, stderr=False)
            return
        for stage in stages(config) if processes.leads else ():
            show_dry_run(make_live(encoder, stage.config, spec), stage, source, processes)
        return
    chosen = training.choices(config, encoder, source, judged=bool(dev or config.eval.folds))
    files = {"backbone": backbone, "train": train, "eval": eval, "ood": ood}
    named = {flag: _lasting(path) for flag, path in files.items() if path} | {"device": device}
    named |= {"columns": columns} if columns else {}
    if AUTO in config.method or config.eval.folds:
        from bertology_serve.cli.train_fleet import Board
        from bertology_serve.training.auto import train_auto

        check_alone("train --folds" if config.eval.folds else "train --method auto")
        if tensorboard:
            raise SpecError("--tensorboard shows one run, and a search or --folds has many; leave it out")
        with Board("candidates", ranked=True, first=chosen) as shown:
            outcome = train_auto(
                config, encoder, source, dev, ood=other, place=place, watcher=shown, prepack=prepack, files=named
            )
        if AUTO in config.method:
            show_search(outcome)
        if plot:
            draw_curve(outcome.path, main_metric(outcome.delta))
        show(outcome, eval)
        return
    boards = []
    if tensorboard and processes.leads:
        from bertology_serve.training.tensorboard import TensorBoard

        boards.append(TensorBoard(tensorboard / place.open()[0]))
    with Bar(chosen) if processes.leads else nullcontext() as bar:
        outcome = training.train(
            config,
            encoder,
            source,
            dev,
            ood=other,
            place=place,
            watcher=CallbackList([*([bar] if bar else []), *boards]),
            prepack=prepack,
            files=named,
            processes=processes,
        )
    if not processes.leads:
        return
    if plot:
        draw_curve(outcome.path, main_metric(outcome.delta))
    show(outcome, eval)


def show_search(outcome: Outcome) -> None:
    """The leader board, and why its winner won."""
    facts = outcome.delta.provenance["auto"]
    columns = [name for name in facts["board"][0] if name not in ("options", "seconds")]
    table("candidates", columns, [[row[name] for name in columns] for row in facts["board"]], stderr=False)
    note(facts["why"])


def _lasting(path: str) -> str:
    """A path that means the same from another folder; what is no path stays as it is."""
    return os.path.abspath(path) if os.path.exists(path) else path


def read_columns(text: str | None) -> dict[str, str]:
    """``text=sentence,label=y`` -> field to column. Raises SpecError."""
    pairs = [part.partition("=") for part in listed(text) or ()]
    for field, _, column in pairs:
        if not field.strip() or not column.strip():
            raise SpecError(
                f"--columns is {text!r}; expected FIELD=COLUMN with commas, such as text=sentence,label=y (a pair that "
                'holds a comma is quoted: "text=Tweet, clean",label=y)'
            )
    return {field.strip(): column.strip() for field, _, column in pairs}


class Bar:
    """A progress bar on a terminal, else a line an epoch and an evaluation. See ``Callback``."""

    def __init__(self, first: str) -> None:
        """``first`` is said before all else, once the data are known to be right."""
        self.bar, self.first = progress("loss", "speed"), first
        self.title, self.total, self.step = "train", 0, 0
        self.loss = self.speed = 0.0
        self.epoch = 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.stop()
        if kind is KeyboardInterrupt and self.step:
            note(f"stopped at step {self.step}; --resume continues from the last checkpoint")

    def staged(self, stage: int, count: int, title: str) -> None:
        """Says which stage of a recipe comes next; its bar begins anew."""
        self._begin()
        note(f"stage {stage} of {count}: {title}")
        self.title, self.loss, self.epoch = f"stage {stage} of {count}", 0.0, 0

    def began(self, step: int, total: int, parameters: ParameterCount) -> None:
        self._begin()
        note(f"training {counted(parameters)}")
        if step:
            note(f"continuing after step {step} of {total}")
        self.total, self.step = total, step
        self.task = self.bar.add_task(self.title, total=total, completed=step, loss="-", speed="-")
        self.bar.start()

    def stepped(self, line: Mapping[str, Any]) -> None:
        """Moves the bar; loss and speed are smoothed over some twenty steps."""
        fresh = self.loss == 0.0
        self.loss = line["loss"] if fresh else 0.95 * self.loss + 0.05 * line["loss"]
        self.speed = line["tokens_per_s"] if fresh else 0.95 * self.speed + 0.05 * line["tokens_per_s"]
        self.step = line["step"]
        self.bar.update(self.task, completed=self.step, loss=f"{self.loss:.3f}", speed=f"{self.speed:,.0f} tokens/s")
        if int(line["epoch"]) > self.epoch or self.step == self.total:
            self.epoch = int(line["epoch"])
            place = f"epoch {line['epoch']:g}, step {self.step} of {self.total}"
            self._say(f"{place}: loss {self.loss:.3f}, {self.speed:,.0f} tokens/s")

    def evaluated(self, line: Mapping[str, Any]) -> None:
        self.bar.update(self.task, completed=line["step"])
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in line["eval"].items())
        where = f"layer {line['layer']}, C {line['c']:.1e}" if "c" in line else f"step {line['step']}"
        self._say(f"{where}: {metrics}", always=True)

    def _begin(self) -> None:
        if self.first:
            note(self.first)
        self.first = ""

    def _say(self, text: str, always: bool = False) -> None:
        if self.bar.disable:
            note(text)
        elif always:
            self.bar.console.print(text)


def percent(share: float) -> str:
    """Two figures, all of those before the point."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def counted(parameters: ParameterCount) -> str:
    """``74,498 parameters (0.33 % of the encoder), 770 of them in the head``."""
    share = f"{percent(parameters.share)} of the encoder and head"
    return f"{parameters.trained:,} parameters ({share}), {parameters.head:,} of them in the head"


def show_dry_run(live: TrainableDelta, stage: Stage, source: Source, processes: Processes) -> None:
    """What a stage would train, and the memory that it would need in each process."""
    from bertology_serve.kinds.kinds import kind_of
    from bertology_serve.training.methods import count_parameters

    count = count_parameters(live)
    rows = [[kind_of(spec).name, field, str(value)] for spec in live.specs for field, value in asdict(spec).items()]
    rows += [["task", field, str(value)] for field, value in asdict(live.task).items()]
    rows += [["parameters", "delta", f"{count.delta:,}"], ["parameters", "head", f"{count.head:,}"]]
    if not stage.solved:
        rows += [
            ["memory", name, f"{value / 2**20:,.1f} MiB"]
            for name, value in needed(live, stage, source, processes).items()
        ]
    table(f"would train {counted(count)}", ["part", "field", "value"], rows, stderr=False)


def needed(live: TrainableDelta, stage: Stage, source: Source, processes: Processes) -> dict[str, int]:
    """Bytes that training needs by their use; activations are tried on the longest of the first thousand records."""
    from bertology_serve.tasks.base import make_items
    from bertology_serve.tasks.registry import task_for
    from bertology_serve.training.memory import estimate
    from bertology_serve.training.trainer import Trainer

    task = task_for(live.task)
    items = make_items(task, source.records[:1000], live.encoder.tokenizer)
    found = estimate(Trainer(live, task, items, stage.config, processes=processes))
    return asdict(found) | {"total": found.total}


def show(outcome: Outcome, eval: str | None) -> None:
    """The evaluation table, and what to type next."""
    from bertology_serve.tasks.metrics import Interval

    delta, state, count = outcome.delta, outcome.state, outcome.parameters
    known = outcome.baselines
    rows = [
        (name, f"{value:.4f}", *(f"{own[name]:.4f}" if name in own else "" for own in known.values()))
        for name, value in delta.metrics.items()
    ]
    facts = [
        ("kind", " + ".join(delta.kinds)),
        ("parameters", f"{count.trained:,} ({percent(count.share)})"),
        ("steps", f"{state.step} (kept: {state.best_step})" if state.metrics else str(state.step)),
        *([("began at", BEGAN[state.start])] if state.start else []),
        ("time", f"{state.seconds:.1f} s"),
        ("saved copy differs by", f"{outcome.difference:.1e}"),
    ]
    rows += [(*fact, *([""] * len(known))) for fact in facts]
    folds = delta.provenance.get("folds")
    if folds:
        rows += [
            (f"{name}, {folds['count']} folds", f"{value:.4f} ± {folds['sd'][name]:.4f}", *([""] * len(known)))
            for name, value in folds["mean"].items()
        ]
    gain = delta.provenance.get("gain")
    if gain:
        over = Interval(gain["value"], gain["low"], gain["high"])
        rows.insert(1, (f"{gain['metric']} over the {gain['over']}", over.points, *([""] * len(known))))
    title = f"{delta.name} {delta.version}" + (f" on {eval}" if eval else "")
    table(title, ["", "delta", *known], rows, stderr=False)
    for line in advice(outcome):
        note(line)
    show_layers(outcome.path)
    note(f"saved to {outcome.path}; next:")
    note_next(
        ["evaluate", outcome.path, "--input", eval or "FILE"],
        ["serve", "--backbone", delta.base.name, "--deltas", outcome.path.parent, "--port", 8000],
    )


def main_metric(delta: Delta) -> str:
    """The metric that the delta was chosen by: of those it has, the first."""
    from bertology_serve.tasks.registry import task_for

    return next(iter(delta.metrics), task_for(delta.task).main_metric)


def advice(outcome: Outcome) -> Iterator[str]:
    """What the figures mean for what to do next, a line each."""
    from bertology_serve.tasks.spec import WHOLE_BATCH
    from bertology_serve.training.baselines import COSINE

    delta, state = outcome.delta, outcome.state
    main = main_metric(delta)
    known = {name: own[main] for name, own in outcome.baselines.items() if main in own}
    if outcome.unimproved:
        yield "no step was better than the probe on these records: the probe is what was saved"
    elif delta.task.kind in WHOLE_BATCH and state.metrics and not state.best_step:
        yield "no step was better than the start on these records: what was saved is the start"
    elif known and main in delta.metrics:
        name = max(known, key=known.__getitem__)
        gain = 100 * (delta.metrics[main] - known[name])
        if name == COSINE and gain < 0:
            yield (
                "the cosine of the untouched encoder's embeddings is better: ask the encoder itself, or take --task "
                "embedding, which begins there"
            )
        yield f"{main}: {gain:+.1f} points beside {'' if name == COSINE else 'the '}{name} ({100 * known[name]:.1f})"
    own = delta.provenance.get("gain")
    if own and own["low"] <= 0:
        yield f"not surely better than the {own['over']}: more --eval records would tell"
    if state.metrics and 0 < state.best_step == state.step and not outcome.unimproved:
        yield "the last step was the best one: more --epochs may help"


def show_layers(directory: Path) -> None:
    """The probe of every layer, where they were asked for."""
    from bertology_serve.training.run_directory import LAYERS

    if not (directory / LAYERS).exists():
        return
    layers = json.loads((directory / LAYERS).read_text(encoding="utf-8"))["layers"]
    names = list(layers[0])
    table("one probe a layer", names, [[layer[name] for name in names] for layer in layers], stderr=False)
