"""How one delta is trained: everything that a run depends on but its data and its encoder. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from bertology_serve.errors import SpecError, nearest
from bertology_serve.tasks.fields import read_label
from bertology_serve.tasks.spec import EMBEDDING, LABEL_KINDS, QUESTION_ANSWERING, TASK_KINDS, TEXT_KINDS, TaskSpec
from bertology_serve.training.method_options import (
    AUTO,
    FULL,
    LEARNING_RATES,
    METHODS,
    PROBE,
    REGULARISED,
    SPECS,
    Values,
    read_options,
)

if TYPE_CHECKING:
    from bertology_serve.files import JsonObject

ALONE = (*SPECS, AUTO)
SOLVED = TEXT_KINDS
"""The tasks whose probe can be solved."""
LP, LP_FT, EH_FT = "lp", "lp-ft", "eh-ft"
DEFAULT_METHODS: Mapping[str | None, str] = {None: "lora", LP: PROBE, LP_FT: FULL, EH_FT: "lora"}

HEAD_RATES: Mapping[str, float] = dict.fromkeys((FULL, *REGULARISED), 1e-3)
HEAD_RATE = 5e-3
# Epochs where none are given: enough_rows examples are seen in all, within limits.
LEAST_EPOCHS, MOST_EPOCHS, ENOUGH_ROWS = 3, 20, 6000
FEW_ROWS = 5000
FEW_ROWS_RATES: Mapping[str, float] = {"lora": 3e-3}
"""Where a run begins at the probe: the rows below which a method has another learning rate, and that."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Steps are updates of the optimizer; a batch is ``batch_size`` examples.

    A batch is run in micro-batches of up to ``max_tokens`` packed rows, whose gradients add up to exactly that of the
    whole batch, so memory bounds ``max_tokens`` and nothing else. ``None`` means the default of the method, the task
    or the machine, as each field says. ``options`` holds fields of the methods' specs: ``{"lora": {"rank": 4}}``.
    """

    task: str = field(metadata={"help": "What the delta answers: " + ", ".join(TASK_KINDS) + "."})
    method: tuple[str, ...] = _option(
        (),
        "One kind of delta or several, with commas, or another method: " + ", ".join(METHODS) + ". Default: lora. "
        "auto tries several of them, together, and keeps the best.",
    )
    budget: str = _option("5m", "auto: what the search may take: minutes (10m), or passes over the data in all (40).")
    recipe: Literal["lp", "lp-ft", "eh-ft"] | None = _option(
        None,
        "lp: the probe, solved to its optimum on cached features; lp-ft: that, then --method (default: full) with its "
        "head; eh-ft: --method (a delta, which is kept too), then full with its head.",
    )
    lp_path: int = _option(10, "lp: values of C that are tried, from 1e-7 to 1e2.")
    lp_layers: Literal["last", "all"] = _option("last", "lp: all: every layer gets a probe, from the same pass.")
    start: Literal["probe", "random"] = _option(
        "probe",
        "Where the head begins. probe: at the linear probe, solved on the frozen encoder's rows in seconds "
        "(classification, multi-label, regression); what is published is never worse on --eval. random: at random.",
    )
    epochs: int | None = _option(None, "Passes over the training data. Default: 3, more for fewer than 2,000 rows.")
    first_epochs: int | None = _option(
        None, "Those of a recipe's first stage; with it AdamW trains the probe of lp-ft. Default: --epochs."
    )
    first_learning_rate: float | None = _option(None, "That of a recipe's first stage. Default: the method's.")
    max_steps: int | None = _option(None, "Stop after so many steps, whatever the epochs.")
    batch_size: int = _option(32, "Examples a step.")
    max_tokens: int = _option(4096, "Tokens a micro-batch; a batch of more is accumulated, with the same gradient.")
    bucket_batches: int = _option(
        0, "Length bucketing: so many batches are sorted by length together and cut anew; 0: none."
    )
    learning_rate: float | None = _option(None, "Highest learning rate. Default: the method's.")
    head_learning_rate: float | None = _option(None, "Highest learning rate of the head. Default: the method's.")
    schedule: Literal["linear", "cosine", "constant"] = _option("linear", "How the learning rate falls.")
    warmup: float = _option(0.06, "Share of the steps over which the learning rate rises.")
    weight_decay: float = _option(0.01, "AdamW's; biases and LayerNorms have none.")
    beta2: float = _option(0.999, "AdamW's second beta; the first is 0.9.")
    epsilon: float = _option(1e-8, "AdamW's epsilon.")
    clip: float = _option(1.0, "Longest gradient; 0: no clipping.")
    seed: int = _option(0, "Decides the first weights, the order of examples and dropout.")
    labels: tuple[str, ...] = _option(
        (), "Labels in logit order, with commas (quoted where they hold one). Default: those of the training data."
    )
    balance: bool = _option(
        False, "Weigh examples so that every label counts alike, however rare it is (classification, multi-label)."
    )
    label_smoothing: float = _option(0.0, "Share of each target that is spread over all labels.")
    calibrate: bool = _option(
        True, "Fit a temperature on --eval and put it into the head: scores then say how often answers are right."
    )
    abstain: float = _option(0.0, "Least score at which an answer names a label; below it the label is null.")
    max_length: int | None = _option(None, "Longest sequence in tokens. Default: 384 for question answering, else 128.")
    pooling: Literal["cls", "mean", "max"] | None = _option(
        None,
        "Rows that the head reads. Default: as the checkpoint says (a sentence encoder's own pooling; cls where that "
        "was pretrained), mean for embeddings.",
    )
    head: Literal["hf", "linear", "mlp", "none"] | None = _option(
        None,
        "hf: the form that HuggingFace gives the family; linear: one layer; mlp: EH-FT's, a hidden one of 2,048. "
        "Default: none for embeddings, linear where the head begins at the probe, else hf.",
    )
    stride: int | None = _option(None, "Overlap in tokens of question-answering windows. Default: 64.")
    max_answer_length: int | None = _option(None, "Longest answer in tokens (question answering). Default: 30.")
    trunk_dropout: bool | None = _option(
        None, "Whether the encoder's own dropout is active. Default: only where it is trained, without mixout."
    )
    trunk_cache: bool = _option(
        False,
        "Keep on disk what enters the lowest trained layer, and skip the frozen layers below it, whose dropout is then "
        "off, from the first step on.",
    )
    checkpointing: bool = _option(
        False, "Keep for the backward pass only what enters each layer, and run the layers again there: less memory."
    )
    precision: Literal["auto", "fp32", "bf16"] = _option(
        "auto", "bf16: the encoder runs under autocast; auto: bf16 on GPUs that have it, else fp32."
    )
    eval_every: int | None = _option(None, "Steps between evaluations. Default: one an epoch.")
    patience: int | None = _option(None, "Stop after so many evaluations without a better one. Default: never.")
    keep: Literal["best", "last"] = _option("best", "Which state is saved where there is evaluation data.")
    save_every: int = _option(200, "Steps between checkpoints; one is written after each evaluation too.")
    gradient_steps: int = _option(0, "First steps whose gradient's length is logged for every layer.")
    skip_bad: bool = _option(False, "Leave out records that the task cannot read, and say which and why.")
    folds: int | None = _option(
        None,
        "Without --eval: so many parts of the training data are held out in turn; their metrics are told, and their "
        "answers calibrate the delta that is then trained on all. Default: none, and 3 for --method auto.",
    )
    options: Mapping[str, Values] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recipe is not None:
            _check_known("recipe", self.recipe, tuple(name for name in DEFAULT_METHODS if name))
        object.__setattr__(self, "method", _methods(self.method or DEFAULT_METHODS[self.recipe]))
        _check_recipe(self)
        labels = (read_label(label, "the configuration", f"labels[{i}]") for i, label in enumerate(self.labels))
        object.__setattr__(self, "labels", tuple(labels))  # as the data's own are read: 1 is "1"
        _check_known("task", self.task, TASK_KINDS)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) is not None:
                _check_known(name, getattr(self, name), allowed)
        for name, least in _LEAST.items():
            _check_number(name, getattr(self, name), least)
        _check_number("warmup", self.warmup, 0, most=1)
        _check_number("label_smoothing", self.label_smoothing, 0, most=0.99)
        if (self.balance or self.label_smoothing) and self.task not in LABEL_KINDS:
            raise SpecError(f"balance and label_smoothing are for {' and '.join(LABEL_KINDS)}, not {self.task}")
        _check_number("beta2", self.beta2, 0, most=1)
        object.__setattr__(self, "budget", str(self.budget))
        read_budget(self.budget)
        if self.budget != TrainConfig.budget and AUTO not in self.method:
            raise SpecError(
                f"budget is what a search may take, and the method is {','.join(self.method)}; give --method auto"
            )
        if self.folds is not None:
            _check_folds(self)
        for name in ("learning_rate", "head_learning_rate", "first_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < 10:
                raise SpecError(f"{name} is {rate!r}; expected a number above 0, such as 1e-3")
        for name in self.options:
            if name not in self.method:
                raise SpecError(f"options of {name!r} were given, but the method is {','.join(self.method)}")
            if name in REGULARISED:
                read_options(name, self.options[name])
        _ = self.form

    @property
    def starts_at_probe(self) -> bool:
        """Whether the probe is solved first, and its head is where training begins."""
        plain = self.recipe is None and self.start == "probe" and PROBE not in self.method
        return plain and self.task in SOLVED and self.head in (None, "linear")

    def passes(self, rows: int) -> int:
        """Epochs over that many rows: as given, or three, and more where those would be few steps."""
        return self.epochs or min(MOST_EPOCHS, max(LEAST_EPOCHS, math.ceil(ENOUGH_ROWS / max(1, rows))))

    @property
    def solvable(self) -> bool:
        """Whether the head is one linear layer that gives a text its label or score."""
        return self.task in SOLVED and self.form.head == "linear"

    @property
    def full(self) -> bool:
        """Whether the encoder itself is trained."""
        return self.method[0] == FULL or self.method[0] in REGULARISED

    @property
    def form(self) -> TaskSpec:
        """The task as far as it is known without data: labels may stand for others."""
        labelled = self.task in (*LABEL_KINDS, "token-classification")
        return self.task_spec(("O",) if labelled and not self.labels else self.labels)

    def rate(self, method: str) -> float:
        """The highest learning rate of one method's parameters."""
        return LEARNING_RATES[method] if self.learning_rate is None else self.learning_rate

    @property
    def head_rate(self) -> float:
        """The highest learning rate of the head's parameters; the probe's is its learning rate."""
        if self.head_learning_rate is not None:
            return self.head_learning_rate
        return self.rate(PROBE) if self.method == (PROBE,) else HEAD_RATES.get(self.method[0], HEAD_RATE)

    def task_spec(self, labels: tuple[str, ...]) -> TaskSpec:
        """The task with its defaults filled in."""
        embedding = self.task == EMBEDDING
        probe = PROBE in self.method or self.recipe == LP_FT or self.starts_at_probe
        return TaskSpec(
            self.task,
            labels=labels,
            max_length=self.max_length or (384 if self.task == QUESTION_ANSWERING else TaskSpec.max_length),
            pooling=self.pooling or ("mean" if embedding or probe else TaskSpec.pooling),
            head=self.head or ("none" if embedding else "linear" if probe else TaskSpec.head),
            stride=TaskSpec.stride if self.stride is None else self.stride,
            max_answer_length=self.max_answer_length or TaskSpec.max_answer_length,
            abstain=self.abstain,
        )

    def as_dict(self) -> JsonObject:
        """Ready for JSON."""
        return {**asdict(self), "method": list(self.method), "labels": list(self.labels)}

    @classmethod
    def from_dict(cls, values: Values) -> TrainConfig:
        """The inverse of ``as_dict``; an unknown key is an error that names the nearest known one."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise SpecError(f"training has no field {name!r}; {nearest(name, known)}")
        if "task" not in values:
            raise SpecError(f"field 'task' is missing; expected one of {', '.join(TASK_KINDS)}")
        return cls(**values)


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "schedule": ("linear", "cosine", "constant"),
    "pooling": ("cls", "mean", "max"),
    "head": ("hf", "linear", "mlp", "none"),
    "precision": ("auto", "fp32", "bf16"),
    "keep": ("best", "last"),
    "start": ("probe", "random"),
    "lp_layers": ("last", "all"),
}
_LEAST: Mapping[str, float] = {
    "epochs": 1, "first_epochs": 1, "max_steps": 1, "batch_size": 1, "max_tokens": 1, "weight_decay": 0,
    "clip": 0, "seed": 0, "max_length": 3, "stride": 0, "max_answer_length": 1, "eval_every": 1, "patience": 1,
    "save_every": 1, "lp_path": 1, "gradient_steps": 0, "bucket_batches": 0, "epsilon": 0,
}  # fmt: skip


def read_budget(text: str) -> tuple[float, bool]:
    """``10m`` -> 600 seconds and True, ``40`` -> 40 passes and False. Raises SpecError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None or not float(found[1]):
        raise SpecError(f"budget is {text!r}; expected minutes such as 10m, or a number of passes over the data")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]], bool(found[2])


def _methods(given: str | Iterable[str]) -> tuple[str, ...]:
    """``lora,bitfit`` or a list of names -> names, each once; what is no kind of delta stands alone."""
    names = tuple(given.split(",")) if isinstance(given, str) else tuple(given)
    for name in names:
        _check_known("method", name, METHODS)
    if len(set(names)) != len(names):
        raise SpecError(f"method {','.join(names)} names a kind twice; name each once")
    alone = [name for name in names if name in ALONE]
    if alone and len(names) > 1:
        raise SpecError(f"method {alone[0]!r} stands alone; got {','.join(names)}")
    return names


def _check_recipe(config: TrainConfig) -> None:
    """Raises SpecError where a recipe and its method do not go together."""
    names = ",".join(config.method)
    if config.recipe and AUTO in config.method:
        raise SpecError(f"recipe {config.recipe} names what is trained, and method auto chooses it; leave one out")
    if config.recipe in (None, LP) and (config.first_epochs or config.first_learning_rate):
        raise SpecError(
            "first_epochs and first_learning_rate are those of a recipe's first stage; give --recipe lp-ft or eh-ft too"
        )
    if config.recipe == LP and (config.method != (PROBE,) or config.task not in SOLVED):
        raise SpecError(
            f"recipe lp solves a probe for {' or '.join(SOLVED)}; got method {names} and task {config.task}; "
            "leave --recipe out, or take lp-ft"
        )
    if config.recipe == LP and config.head not in (None, "linear"):
        raise SpecError(f"recipe lp solves one linear layer; got head {config.head!r}; leave --head out")
    if config.recipe == EH_FT and config.method[0] in ALONE:
        raise SpecError(
            f"recipe eh-ft begins with a delta, but the method is {names}; expected lora, bitfit or another"
        )
    if config.recipe == LP_FT and config.method == (PROBE,):
        raise SpecError("recipe lp-ft begins with the probe, and goes on with another method; expected full or another")


def _check_folds(config: TrainConfig) -> None:
    """Raises SpecError where folds cannot be trained together."""
    _check_number("folds", config.folds, 2)
    if config.recipe or config.full:
        raise SpecError(
            f"folds share one frozen encoder, but {config.recipe or config.method[0]} trains its own; leave them out"
        )


def _check_known(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SpecError(f"unknown {name} {value!r}; {nearest(str(value), known)}")


def _check_number(name: str, value: object, least: float, most: float | None = None) -> None:
    if value is None:
        return
    limits = f"from {least}" + (f" to {most}" if most is not None else " up")
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not least <= number < math.inf or (most is not None and number > most):
        raise SpecError(f"{name} is {value!r}; expected a number {limits}")
