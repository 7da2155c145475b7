"""The public functions: what the commands do, from Python. ``bertology_serve`` names them all.

Each does one job from end to end: ``load_delta``, ``train``, ``evaluate``; ``export`` is in the package of its name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from bertology_serve.data.records import DataLike, read_records
from bertology_serve.deltas.catalog import newest
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder import opening
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import SpecError
from bertology_serve.kinds.kinds import kind_of
from bertology_serve.training.auto import Forwarded, train_auto
from bertology_serve.training.batches import Data, Source
from bertology_serve.training.evaluation import Evaluation
from bertology_serve.training.evaluation import evaluate as measured
from bertology_serve.training.method_options import AUTO, SPECS
from bertology_serve.training.run_directory import Destination
from bertology_serve.training.train import train as run
from bertology_serve.training.train import usable
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import Callback, CallbackList

Method = str | Any


def load_delta(path: str | Path, encoder: Encoder | None = None) -> Delta:
    """A delta from its directory, or the newest of its versions; every byte of it is checked.

    With an ``encoder`` it is also fitted to that, and proven to run on it (deltas in peft's format need one). Raises
    SpecError for what is no path, NotFound where there is none, FormatError for one that is damaged, BaseMismatch for
    one that was made for another encoder, Unsupported for one that it cannot apply.
    """
    if not isinstance(path, str | Path):
        raise SpecError(f"a delta is read from its directory, not from {path!r:.60}; give a path")
    return opening.load_delta(newest(Path(path)), encoder)


def train(
    encoder: Encoder,
    data: DataLike,
    *,
    task: str = "classification",
    method: Method | Iterable[Method] = (),
    eval: DataLike | None = None,
    ood: DataLike | None = None,
    columns: Mapping[str, str] | None = None,
    out: str | Path | None = None,
    name: str = "delta",
    version: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Delta:
    """Trains one delta, and returns it once a saved copy has given the same answers.

    ``data``, ``eval`` (it chooses the state that is kept) and ``ood`` (another domain, only measured) are files, names
    of data sets, lists of records, pandas DataFrames or ``datasets.Dataset``; ``columns`` says which column holds which
    field: ``{"text": "sentence"}``. ``method`` is a spec, such as ``Lora(rank=8)``, ``Probe()`` or ``Full()``, the name
    of a method, or several kinds of delta; ``"auto"`` tries several within ``budget`` (``"10m"``, or passes over the
    data) and keeps the best. With ``out`` the delta is kept in that directory, else only in memory, as ``name``:
    ``delta.save(path)`` writes it. ``settings`` are those of ``TrainConfig.of``: ``epochs=5``. The encoder is left as
    it was; a pipeline over it must not answer meanwhile with ``trunk_dropout``, ``trunk_cache``, ``checkpointing`` or
    ``precision="bf16"``, which change how it runs until then.

    Raises DataError naming file and row, SpecError for settings that do not fit, InputError where something is in the
    way at ``out``, LimitError for sequences that the encoder cannot read.
    """
    if not isinstance(encoder, Encoder):
        raise SpecError(f"a delta is trained on an encoder, not on {encoder!r:.60}; give Encoder('minilm')")
    config = TrainConfig.of(task, **_method(method), **settings)
    source, dev, other = (None if one is None else Source.read(one, columns) for one in (data, eval, ood))
    assert source is not None
    read = usable(config, Data(source, dev, other))
    source, dev, other = read.train, read.dev, read.ood
    with nullcontext() if out is not None else tempfile.TemporaryDirectory() as folder:
        at = Path(out) if out is not None else Path(str(folder)) / name
        place = Destination(at, None, version, resume, overwrite)
        own, told = encoder.fresh() if config.full else encoder, CallbackList(callbacks)
        if AUTO in config.method or config.eval.folds:
            watcher = Forwarded(told)
            return train_auto(config, own, source, dev, ood=other, place=place, watcher=watcher).delta
        return run(config, own, source, dev, ood=other, place=place, watcher=told).delta


def evaluate(
    delta: Delta | str | Path,
    data: DataLike,
    encoder: Encoder | None = None,
    *,
    columns: Mapping[str, str] | None = None,
) -> Evaluation:
    """A delta's metrics (fractions) on labelled records, and its answer to each, through the engine that serves it.

    ``encoder`` defaults to the base that the delta names. Raises DataError naming the record that is wrong.
    """
    found = delta if isinstance(delta, Delta) else load_delta(delta, encoder)
    return measured(found, read_records(data, columns, found.columns), encoder)


def _method(given: Method | Iterable[Method]) -> dict[str, Any]:
    """``method`` and ``options`` of a TrainConfig from specs, names, or both."""
    chosen: list[Any] = given.split(",") if isinstance(given, str) else [given] if is_dataclass(given) else list(given)
    names, options = [], {}
    for one in chosen:
        form = next((name for name, spec in SPECS.items() if isinstance(one, spec)), None)
        names.append(one if isinstance(one, str) else form or kind_of(one).name)
        if not isinstance(one, str) and fields(one):
            options[names[-1]] = {field.name: getattr(one, field.name) for field in fields(one)}
    return {"method": tuple(names), "options": options}
