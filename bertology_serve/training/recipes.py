"""Recipes: compositions of stages, each naming what is trained and from what start. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bertology_serve.errors import SpecError
from bertology_serve.files import JsonObject
from bertology_serve.training.method_options import AUTO, FULL, KINDS, PROBE
from bertology_serve.training.train_config import CONTRASTIVE, EH_FT, LP, LP_FT, RANDOM, TrainConfig

SLOWER = 1 / 3
"""The learning rate of a head that begins at the probe, as a share of the delta's."""


@dataclass(frozen=True)
class Stage:
    """One training, always from the pretrained encoder.

    ``config`` names what is trained. The head starts at random, or with ``given_head`` as the stage before left it.
    ``solved``: the head is found as an optimum, without steps. ``kept`` is what the delta of a stage that is not the
    last adds to the name when it is published as a product of its own; without it that delta serves the next only.
    ``improves``: where the dev set shows it no better than the stage before, that stage's delta is published instead.
    ``contrastive``: it begins by bringing texts of one label together (see ``contrastive_start``).
    """

    config: TrainConfig
    given_head: bool = False
    solved: bool = False
    kept: str = ""
    improves: bool = False
    contrastive: bool = False

    @property
    def title(self) -> str:
        what = " + ".join(self.config.method) + (", solved" if self.solved else "")
        return f"{what}, with the head of the stage before" if self.given_head else what


def stages(config: TrainConfig) -> tuple[Stage, ...]:
    """The stages of a configuration's recipe, in order. Without one: the probe where the head begins there, and the
    method.
    """
    if AUTO in config.method:
        raise SpecError("method auto is a search by itself, which train runs; name a kind of delta here")
    if config.plan.recipe:
        return RECIPES[config.plan.recipe](config)
    if not config.starts_at_probe:
        return (Stage(config),)
    probe, method = _lp_ft(config)
    rate = config.optim.head_learning_rate or SLOWER * method.config.rate(config.method[0])
    own = method.config.replaced(head_learning_rate=rate)
    return probe, replace(method, improves=True, config=own, contrastive=config.plan.start == CONTRASTIVE)


def _lp(config: TrainConfig) -> tuple[Stage, ...]:
    """A linear probe at its optimum."""
    return (Stage(_first(config, (PROBE,)), solved=True),)


def _lp_ft(config: TrainConfig) -> tuple[Stage, ...]:
    """LP-FT (Kumar et al. 2022, arXiv 2202.10054): a linear probe, then fine-tuning with that head.

    The probe is solved where that can be done and no epochs are given for it.
    """
    solved = config.solvable and config.plan.first_epochs is None
    return Stage(_first(config, (PROBE,)), solved=solved), Stage(_last(config, config.method), given_head=True)


def _eh_ft(config: TrainConfig) -> tuple[Stage, ...]:
    """EH-FT (Yang et al. 2022, arXiv 2210.16771): a delta and its head, then full fine-tuning with that head alone."""
    first = Stage(_first(config, config.method), kept="-".join(config.method))
    return first, Stage(_last(config, (FULL,)), given_head=True)


RECIPES: Mapping[str, Callable[[TrainConfig], tuple[Stage, ...]]] = {LP: _lp, LP_FT: _lp_ft, EH_FT: _eh_ft}


def _first(config: TrainConfig, method: tuple[str, ...]) -> TrainConfig:
    """The stage that finds the head: its own epochs and rate; the rates and dropout that were given are the last's."""
    return _stage(
        config,
        method,
        epochs=config.plan.first_epochs or config.optim.epochs,
        learning_rate=config.plan.first_learning_rate,
        head_learning_rate=None,
        trunk_dropout=None,
        trunk_cache=False,
    )


def _last(config: TrainConfig, method: tuple[str, ...]) -> TrainConfig:
    """The stage that begins with a head: that no longer learns faster than the rest."""
    rate = _stage(config, method).rate(method[0])
    return _stage(config, method, head_learning_rate=config.optim.head_learning_rate or rate)


def _stage(config: TrainConfig, method: tuple[str, ...], **values: Any) -> TrainConfig:
    """One method of a recipe; all stages have the head's form in common."""
    own = {name: fields for name, fields in config.options.items() if name in method}
    shared: JsonObject = {"pooling": config.known_task.pooling, "head": config.known_task.head}
    shared["layers"] = config.layers if method[0] in KINDS else ()
    plain: JsonObject = {"recipe": None, "first_epochs": None, "first_learning_rate": None, "start": RANDOM}
    return config.replaced(method=method, options=own, **shared, **plain, **values)
