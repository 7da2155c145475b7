"""Trains one delta from records to a published directory: the whole life, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bertology_serve.data.records import Record, infer_labels
from bertology_serve.deltas import store
from bertology_serve.deltas.catalog import identify
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import TrainableDelta, nested
from bertology_serve.errors import DataError
from bertology_serve.kinds import kinds
from bertology_serve.tasks.base import Answer, Item, Task, all_pairs, make_items
from bertology_serve.tasks.fields import holds_several
from bertology_serve.tasks.registry import task_for, task_named
from bertology_serve.tasks.spec import CLASSIFICATION, MULTI_LABEL, SPARSE, VECTOR_KINDS, TaskSpec
from bertology_serve.training.baselines import PROBE, baselines
from bertology_serve.training.batches import Data, Source, shaped
from bertology_serve.training.calibration import Judged, settled, with_ranges
from bertology_serve.training.config_file import settings_text
from bertology_serve.training.evaluation import Evaluation, answered, measure
from bertology_serve.training.method_options import AUTO
from bertology_serve.training.methods import (
    ParameterCount,
    begin_at_probe,
    count_parameters,
    make_live,
    specs_for,
    start_at_data,
    state_bytes,
    uses_bf16,
)
from bertology_serve.training.probe_solver import Solver
from bertology_serve.training.processes import ALONE, Processes
from bertology_serve.training.publish import publish, publish_copy
from bertology_serve.training.recipes import Stage, stages
from bertology_serve.training.run_directory import Destination, Follower, RunDirectory, RunState, identity, provenance
from bertology_serve.training.train_config import (
    CONTRASTIVE,
    CONTRASTIVE_ROWS,
    FEW_ROWS,
    FEW_ROWS_RATES,
    LEAST_ROWS,
    TrainConfig,
)
from bertology_serve.training.trainer import Callback, NoCallback, Trainer


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs in memory: the live delta, its task, and the examples made ready."""

    live: TrainableDelta
    task: Task
    items: list[Item]
    dev: list[Item]
    ood: list[Item] = field(default_factory=list)

    def sample(self, data: Data) -> tuple[list[Item], Sequence[Record]]:
        """The items, and their records, that a saved copy is compared on."""
        return (self.dev, data.dev.records) if data.dev else (self.items, data.train.records)


@dataclass(frozen=True)
class Outcome:
    """What came of a run: the delta, where it lies, and how the copy there compares (see ``publish``).

    ``optimizer_bytes`` is what the last stage's optimizer held; a probe that was solved had none. ``baselines`` are
    the dev metrics of what the delta has to beat, by name; ``unimproved``: the probe is what was published.
    """

    delta: Delta
    path: Path
    parameters: ParameterCount
    state: RunState
    difference: float
    optimizer_bytes: int = 0
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unimproved: bool = False


def prepare(
    config: TrainConfig, encoder: Encoder, train: Source, dev: Source | None = None, ood: Source | None = None
) -> Prepared:
    """Finds the labels, checks and tokenises every record, and makes the live delta.

    Raises DataError naming file and row: for a label of ``dev`` or ``ood`` that ``train`` does not have, too.
    """
    spec = task_spec(config, encoder, train)
    live, task = make_live(encoder, config, spec), task_for(spec)
    items = make_items(task, train.records, encoder.tokenizer)
    start_at_data(live, items)
    items = shaped(task, items, config, encoder.tokenizer)
    others = [make_items(task, source.records, encoder.tokenizer) if source else [] for source in (dev, ood)]
    return Prepared(live, task, items, *others)


def train(
    config: TrainConfig,
    encoder: Encoder,
    train: Source,
    dev: Source | None = None,
    *,
    ood: Source | None = None,
    place: Destination,
    watcher: Callback | None = None,
    prepack: bool | None = None,
    files: Mapping[str, str] | None = None,
    processes: Processes = ALONE,
) -> Outcome:
    """Trains, saves, compares and publishes one delta, stage by stage where the configuration is a recipe.

    A stage ends in the directory of a delta: the last one's is ``place``, the others' lie in the run directory, where a
    continued run finds them. ``ood`` records, of another domain than ``dev``, choose nothing; what is kept is measured
    on them once, and the metrics' names begin with ``ood_``. The encoder is changed by ``full``, and must not be used
    for anything else meanwhile.

    ``prepack`` says whether frozen linears are laid out for oneDNN (``None``: a short timing decides). ``files`` are
    what ``config.toml``, which lies beside the delta in the end, says of the backbone and the data; names by default.
    All of ``processes`` call this with the same arguments but ``encoder``'s device; see there.
    """
    config = for_rows(for_encoder(for_data(config, train), encoder), train)
    plan = stages(config)
    name, directory = place.open()
    products = {stage.kept: place.beside(stage.kept).open() for stage in plan if stage.kept}
    for stage in plan:  # what cannot be trained is said before anything is
        kinds.init(specs_for(stage.config, encoder.anatomy), encoder.anatomy, torch.Generator())
    ready = prepare(plan[0].config, encoder, train, dev, ood)
    data = Data(train, dev, ood)
    processes.wait()  # all have found the place free
    directory = directory if processes.leads else Follower(directory.out)
    what = identity(config, encoder, name, data, processes.count)
    began = processes.gathered(directory.open(what, machine(config, encoder, prepack), place.resume))[0]
    lay_out(encoder, began)
    directory.write_config(settings_text(config, files or data.names(encoder.name), began["prepacked"]))
    directory.write_skipped(data.skipped)
    begin = baselines(encoder, ready.task, ready.items, ready.dev) if dev else {}
    run = StageRun(config, data, directory, place.version or "", watcher or NoCallback(), processes, begin)
    for number, stage in enumerate(plan[:-1], 1):
        own, product = products.get(stage.kept, (name, None))
        if not any(processes.gathered(directory.stage(number).exists())):
            run.stage(stage, number, len(plan), ready, own, directory.stage(number))
        if product is not None and processes.leads:
            publish_copy(directory.stage(number), product.out)
    outcome = run.stage(plan[-1], len(plan), len(plan), ready, name, directory.out)
    directory.remove()
    return replace(outcome, delta=replace(outcome.delta, version=identify(directory.out).version))


@dataclass(frozen=True)
class StageRun:
    """What the stages of one run have in common."""

    config: TrainConfig
    data: Data
    directory: RunDirectory
    version: str
    watcher: Callback
    processes: Processes
    baselines: Mapping[str, Mapping[str, float]]

    def stage(self, stage: Stage, number: int, count: int, ready: Prepared, name: str, out: Path) -> Outcome:
        before = store.load(self.directory.stage(number - 1)) if number > 1 else None
        live = ready.live if before is None else _continued(stage, ready, before)
        if stage.config.machine.trunk_cache:
            from bertology_serve.training.frozen_rows import FrozenPrefixCache

            items, folder = [*ready.items, *ready.dev], self.directory.features
            cache = FrozenPrefixCache(live, items, stage.config.machine.max_tokens, folder)
            live.around = nested(cache.over, live.around)
        if count > 1:
            self.watcher.staged(number, count, stage.title)
        own = (
            live,
            ready.task,
            ready.items,
            stage.config,
            ready.dev,
            self.directory,
            self.watcher,
            number * (count > 1),
        )
        # a recipe's rows are for others too
        own_rows = None if self.config.plan.recipe else self.directory.path / "features"
        trainer = Solver(*own, own_rows) if stage.solved else Trainer(*own, self.processes)
        trainer.state.seconds = before.provenance["seconds"] if before else 0.0
        known = dict(self.baselines)
        if before and stage.improves and isinstance(trainer, Trainer):
            known |= {PROBE: before.metrics} if before.metrics else {}
            trainer.begin_at(before.metrics, first_of(stage, live, ready))
        state = trainer.run()
        if before and isinstance(trainer, Trainer) and trainer.unimproved:
            return self._unimproved(before, ready.live if not live.full else _untouched(ready.live), ready, state, out)
        last = number == count
        config = self.config if last else stage.config
        probe = self._probe_answers(before, ready, stage.config, own_rows) if before and PROBE in known else ()
        delta = finished(live, ready, state, config, self.data, known, name, self.version, self.processes, last, probe)
        difference = self._publish(delta, live, ready, out)
        held = state_bytes(trainer.optimizer) if isinstance(trainer, Trainer) else 0
        return Outcome(delta, out, count_parameters(live), state, difference, held, known)

    def _probe_answers(
        self, before: Delta, ready: Prepared, config: TrainConfig, folder: Path | None
    ) -> Sequence[Answer]:
        """What the stage before, the probe, says of the dev items; the rows that it was solved on are still there."""
        live = TrainableDelta(ready.live.encoder, (), ready.live.task)
        live.head.adopt(before.head)
        solver = Solver(live, ready.task, ready.items, config, ready.dev, self.directory, folder=folder)
        return solver.answers() if ready.dev else ()

    def _unimproved(self, before: Delta, live: TrainableDelta, ready: Prepared, state: RunState, out: Path) -> Outcome:
        """Publishes the stage before, the probe, on ``live``: no state of this one was better on the dev set."""
        live.head.adopt(before.head)
        with settled(live, ready.dev, self.config.machine.max_tokens, self.config.form.calibrate) as scores:
            facts = {**before.provenance, **scores.facts}
            delta = live.freeze(before.name, self.version, {**before.metrics, **scores.metrics}, facts)
        difference = self._publish(delta, live, ready, out)
        counts = ParameterCount(0, sum(tensor.numel() for tensor in before.head.values()), 0)
        return Outcome(delta, out, counts, state, difference, baselines=self.baselines, unimproved=True)

    def _publish(self, delta: Delta, live: TrainableDelta, ready: Prepared, out: Path) -> float:
        """Publishes a delta once, whatever the number of processes; see ``publish``."""
        leads, extras = self.processes.leads, self.directory.extras()
        difference = publish(delta, live, out, *ready.sample(self.data), extra=extras) if leads else 0.0
        self.processes.wait()
        return difference


def finished(
    live: TrainableDelta,
    ready: Prepared,
    state: RunState,
    config: TrainConfig,
    data: Data,
    known: Mapping[str, Mapping[str, float]],
    name: str,
    version: str = "",
    processes: Processes = ALONE,
    last: bool = True,
    probe: Sequence[Answer] = (),
    judged: Judged | None = None,
) -> Delta:
    """The delta that training ended with: its metrics, on ``ood`` items too, what it had to beat, how it came to be.

    What the dev set settles is in it where the stage is the ``last``: others begin with the head as it was trained.
    ``provenance.gain`` is the main metric over that of the ``probe``'s answers, with its 95 % interval.
    """
    facts = provenance(config, count_parameters(live), state, data, live.encoder, processes.count)
    rows = config.machine.max_tokens
    with settled(live, ready.dev if last else (), rows, config.form.calibrate, judged) as scores:
        elsewhere = measure(live, task_for(live.task), ready.ood, rows, processes) if ready.ood else {}
        metrics = {**state.metrics, **scores.metrics, **{f"ood_{metric}": value for metric, value in elsewhere.items()}}
        if probe:
            answers = scores.answers or answered(live, ready.task, ready.dev, rows)
            own = Evaluation({}, answers, 0, ready.task, [item.example for item in ready.dev], ())
            facts["gain"] = {"over": PROBE, "metric": ready.task.main_metric, **asdict(own.gain(ready.task, probe))}
        delta = live.freeze(name, version, metrics, {**facts, "baselines": known, **scores.facts})
    return with_ranges(delta, live, ready.dev or ready.items, rows) if last else delta


def _untouched(probe: TrainableDelta) -> TrainableDelta:
    """The same probe on the encoder as it was before all of it was trained."""
    return TrainableDelta(probe.encoder.fresh(), probe.specs, probe.task)


def _continued(stage: Stage, ready: Prepared, before: Delta) -> TrainableDelta:
    """The next stage's live delta: the pretrained encoder, and the head that the stage before ended with."""
    live = make_live(ready.live.encoder, stage.config, ready.live.task)
    if stage.improves:
        begin_at_probe(live, before.head)
    elif stage.given_head:
        live.head.adopt(before.head)
    return live


def machine(config: TrainConfig, encoder: Encoder, prepack: bool | None = None) -> dict[str, bool]:
    """What a timing decides unless ``prepack`` says it, and must not change in the course of a run."""
    autocast = uses_bf16(config.machine.precision, encoder.device) and not encoder.can_round
    return {"prepacked": not autocast and encoder.prepack(prepack)}


def lay_out(encoder: Encoder, chosen: Mapping[str, bool]) -> None:
    """Runs the frozen linears as the run began: oneDNN's last bits are not those of plain linears."""
    encoder.prepack(True) if chosen["prepacked"] else encoder.unpack_weights()


def for_encoder(config: TrainConfig, encoder: Encoder) -> TrainConfig:
    """The configuration with the pooling and head that suit the encoder, where none were given.

    A sentence encoder's pooled row was trained, so a linear head reads that. Elsewhere a probe reads [CLS] where the
    checkpoint has a pooler, which was trained on it, else the mean.
    """
    form, own = config.known_task, encoder.sentence and encoder.sentence.pooling
    if form.reads_rows:
        return config
    first_row = config.starts_at_probe and "pooler.dense.weight" in encoder.base_head
    chosen: dict[str, Any] = {
        "pooling": config.form.pooling or own or ("cls" if first_row else form.pooling),
        "head": config.form.head or ("linear" if own and form.head == "hf" else form.head),
    }
    if config.task in VECTOR_KINDS and (prompts := encoder.base_task.prompts):
        from bertology_serve.tasks.embedding import prompt_of

        query, document = config.form.prompt_query, config.form.prompt_document
        chosen["prompt_query"] = prompt_of("query", prompts) if query is None else query
        chosen["prompt_document"] = prompt_of("document", prompts) if document is None else document
    return config.replaced(**chosen)


def for_data(config: TrainConfig, train: Source) -> TrainConfig:
    """The configuration for multi-label where a classification's labels are lists; with the loss of embeddings that
    the first record calls for."""
    if config.task in VECTOR_KINDS and config.optim.loss == "auto":
        from bertology_serve.tasks.embedding import loss_of

        example = task_for(config.known_task).example(*train.records[0], labelled=True)
        return config.replaced(loss=loss_of(example))
    several = config.task == CLASSIFICATION and holds_several(train.records)
    return config.replaced(task=MULTI_LABEL) if several else config


def usable(config: TrainConfig, data: Data) -> Data:
    """With ``skip_bad`` the data without the records that the task cannot read.

    Raises DataError where a source has no others.
    """
    if not config.eval.skip_bad:
        return data
    train = _usable(config, data.train, config.form.labels)
    labels = config.form.labels or infer_labels(config.task, train.records)
    return Data(train, *(source and _usable(config, source, labels) for source in (data.dev, data.ood)))


def _usable(config: TrainConfig, source: Source, labels: tuple[str, ...]) -> Source:
    known, good, skipped = task_named(config.task), [], list(source.skipped)
    for record in source.records:
        try:
            own = labels or known.labels_in([record]) or config.known_task.labels
            task_for(replace(config.known_task, labels=own)).example(*record, labelled=True)
        except DataError as error:
            skipped.append(str(error))
        else:
            good.append(record)
    if not good:
        raise DataError(f"{source.name}: none of its {len(source.records):,} records can be read: {skipped[0]}")
    return replace(source, records=good, skipped=skipped)


def first_of(stage: Stage, live: TrainableDelta, ready: Prepared) -> Callable[[], None] | None:
    """What a stage does before its first step."""
    if not stage.contrastive:
        return None
    from bertology_serve.training.contrastive_start import bring_together

    return partial(bring_together, live, ready.task, ready.items, stage.config)


def for_rows(config: TrainConfig, train: Source) -> TrainConfig:
    """The configuration with what suits so many rows where it was not given: where training begins, and the learning
    rate from a probe.
    """
    rows = len(train.records)
    delta = config.task == CLASSIFICATION and config.starts_at_probe and not config.full and AUTO not in config.method
    if delta and rows < CONTRASTIVE_ROWS and config.plan.start is None:
        labels = config.form.labels or infer_labels(config.task, train.records)
        config = config.replaced(start=CONTRASTIVE) if rows >= LEAST_ROWS * len(labels) else config
    rate = FEW_ROWS_RATES.get(",".join(config.method)) if rows < FEW_ROWS else None
    chosen = config.optim.learning_rate or config.options or not config.starts_at_probe
    return config if chosen or rate is None else config.replaced(learning_rate=rate)


def choices(config: TrainConfig, encoder: Encoder, train: Source, judged: bool = True) -> str:
    """What the defaults came to on that encoder with these training rows, and why, in one line; ``judged``: there is a
    dev set.
    """
    chosen, parts, rows = for_rows(for_encoder(config, encoder), train), [], len(train.records)
    if not chosen.known_task.reads_rows:
        own = "it has a pooler" if chosen.form.pooling == "cls" else "no pooler"
        why = "the checkpoint's own" if encoder.sentence else own
        parts.append(f"pooling {chosen.form.pooling} ({'as given' if config.form.pooling else why})")
    form = "hf, at random" if chosen.known_task.head == "hf" else chosen.known_task.head
    parts += [f"loss {chosen.optim.loss}" if chosen.task in VECTOR_KINDS else f"head {form}"]
    if chosen.plan.start == CONTRASTIVE:
        parts.append("contrastive start")
    parts += [*(f"{name} at {chosen.rate(name):g}" for name in chosen.method if name != AUTO)]
    if chosen.plan.start == CONTRASTIVE and not judged and chosen.stops_at_start:
        parts.append("no epochs without --eval")
    elif not config.plan.recipe:
        parts.append(f"{chosen.passes(rows)} epochs")
    given = config.plan.recipe or (config.optim.epochs and chosen.optim == config.optim)
    return "; ".join(parts) + ("" if given else f" (for {rows:,} rows)")


def task_spec(config: TrainConfig, encoder: Encoder, train: Source) -> TaskSpec:
    """The task: with the labels of the training data and a length that the encoder reads where none were given, and
    whether the data are pairs; and the texts of its labels."""
    spec = config.task_spec(config.form.labels or infer_labels(config.task, train.records))
    words = len(encoder.model.get_input_embeddings().weight) if config.task == SPARSE else spec.width
    spec = replace(spec, pairs=all_pairs(config.task, train.records), width=words)
    if config.form.label_texts:
        from bertology_serve.tasks.zero_shot import read_label_texts

        spec = replace(spec, label_texts=read_label_texts(config.form.label_texts, spec.labels))
    return spec if config.form.max_length else replace(spec, max_length=min(spec.max_length, encoder.max_tokens))
