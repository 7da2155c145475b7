"""How one delta is trained: everything that a run depends on but its data and its encoder. Imports no torch."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bertology_serve.config_fields import check_fields, check_known, flat, nested, option, split_list
from bertology_serve.errors import SpecError
from bertology_serve.tasks import spec as tasks
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.training.method_options import (
    AUTO,
    EVERYWHERE,
    FULL,
    LEARNING_RATES,
    METHODS,
    PROBE,
    REGULARISED,
    SPECS,
    TOP_K,
    Values,
    read_layers,
    read_options,
)

if TYPE_CHECKING:
    from bertology_serve.files import JsonObject

ALONE = (*SPECS, AUTO)
SOLVED = tasks.TEXT_KINDS
"""The tasks whose probe can be solved."""
LP, LP_FT, EH_FT = "lp", "lp-ft", "eh-ft"
START_PROBE, CONTRASTIVE, RANDOM = "probe", "contrastive", "random"
DEFAULT_METHODS: Mapping[str | None, str] = {None: "lora", LP: PROBE, LP_FT: FULL, EH_FT: "lora"}

HEAD_RATES: Mapping[str, float] = dict.fromkeys((FULL, *REGULARISED), 1e-3)
HEAD_RATE = 5e-3
# Epochs where none are given: enough_rows examples are seen in all, within limits.
LEAST_EPOCHS, MOST_EPOCHS, ENOUGH_ROWS = 3, 20, 6000
FEW_ROWS = 5000
CONTRASTIVE_ROWS, LEAST_ROWS = 200, 2
"""A delta begins by bringing texts of one label together where there are fewer rows of classification than that, and so
many a label, without which there are hardly any pairs of one."""
VECTOR_WIDTH = 128
"""The length of multi-vector's vectors where none is given: ColBERT's."""
FEW_ROWS_RATES: Mapping[str, float] = {"lora": 3e-3}
"""Where a run begins at the probe: the rows below which a method has another learning rate, and that."""


def _check_rate(name: str, rate: float | None) -> None:
    if rate is not None and not 0 < rate < 10:
        raise SpecError(f"{name} is {rate!r}; expected a number above 0 and below 10, such as 1e-3")


@dataclass(frozen=True)
class FormConfig:
    """The form of the task and its head: what ``TaskSpec`` says of them. Raises SpecError."""

    labels: tuple[str, ...] = option(
        (), "Labels in logit order, with commas (quoted where they hold one). Default: those of the training data."
    )
    max_length: int | None = option(
        None, "Longest sequence in tokens. Default: 384 for question answering, else 128.", least=3
    )
    pooling: Literal["cls", "mean", "max"] | None = option(
        None,
        "Rows that the head reads. Default: as the checkpoint says (a sentence encoder's own pooling; cls where that "
        "was pretrained), mean for embeddings.",
    )
    head: Literal["hf", "linear", "mlp", "none"] | None = option(
        None,
        "hf: the form that HuggingFace gives the family; linear: one layer; mlp: EH-FT's, a hidden one of 2,048. "
        "Default: none for embeddings, linear where the head begins at the probe, else hf.",
    )
    long: Literal["cut", "windows"] = option(
        "cut", "Texts beyond --max-length are cut, or read in windows whose outputs become one answer."
    )
    aggregate: Literal["mean", "max"] = option(
        "mean", "Of the windows' logits or embeddings: the mean, by tokens, or the largest of each."
    )
    stride: int | None = option(
        None, "Overlap of windows in tokens. Default: 64 for question answering, else a quarter of theirs.", least=0
    )
    matryoshka: tuple[int, ...] = option(
        (), "embedding: widths at which vectors can be cut, with commas (384,256,128,64); the loss is summed over them."
    )
    prompt_query: str | None = option(
        None,
        'embedding: what is read before a query (in training the first text), "query: ". Default: the checkpoint\'s.',
    )
    prompt_document: str | None = option(
        None, 'embedding: what is read before a document (what belongs to it, or not), "passage: ". Default: as above.'
    )
    width: int | None = option(None, "multi-vector: numbers in each vector. Default: 128.", least=1)
    max_terms: int = option(0, "sparse: weights that are kept of each text, the largest; 0: all.", least=0)
    skip_punctuation: bool = option(True, "multi-vector: no vectors for the punctuation of documents.")
    max_answer_length: int | None = option(None, "Longest answer in tokens (question answering). Default: 30.", least=1)
    calibrate: bool = option(
        True, "Fit a temperature on --eval and put it into the head: scores then say how often answers are right."
    )
    label_texts: str | None = option(
        None, "zero-shot: JSON file of the texts that stand for labels, by name. Default: their names, as words."
    )
    template: str = option("{}", "zero-shot: what is put around a label's text, {} in its place.")
    abstain: float = option(0.0, "Least score at which an answer names a label; below it the label is null.")

    def __post_init__(self) -> None:
        check_fields(self)
        from bertology_serve.tasks.fields import read_label  # not for --help

        labels = (read_label(label, "the configuration", f"labels[{i}]") for i, label in enumerate(self.labels))
        object.__setattr__(self, "matryoshka", tuple(self.matryoshka))
        object.__setattr__(self, "labels", tuple(labels))  # as the data's own are read: 1 is "1"


@dataclass(frozen=True)
class RecipeConfig:
    """The stages of a training, where its head starts, and what a search of methods may spend. Raises SpecError."""

    budget: str = option("5m", "auto: what the search may take: minutes (10m), or passes over the data in all (40).")
    recipe: Literal["lp", "lp-ft", "eh-ft"] | None = option(
        None,
        "lp: the probe, solved to its optimum on cached features; lp-ft: that, then --method (default: full) with its "
        "head; eh-ft: --method (a delta, which is kept too), then full with its head.",
    )
    lp_path: int = option(10, "lp: values of C that are tried, from 1e-7 to 1e2.", least=1)
    lp_layers: Literal["last", "all"] = option("last", "lp: all: every layer gets a probe, from the same pass.")
    start: Literal["probe", "contrastive", "random"] | None = option(
        None,
        "Where training begins. probe: the head at the linear probe, solved on the frozen encoder's rows in seconds "
        "(classification, multi-label, regression); what is published is never worse on --eval. contrastive: there, or "
        "where --eval finds that better, with a delta that a few steps have brought texts of one label together by, as "
        "SetFit does (classification); without --eval and --epochs that is all. random: at random. Default: "
        f"contrastive for a delta of fewer than {CONTRASTIVE_ROWS} rows of classification; else probe.",
    )
    first_epochs: int | None = option(
        None,
        "Those of a recipe's first stage; with it AdamW trains the probe of lp-ft. Default: --epochs.",
        least=1,
    )
    first_learning_rate: float | None = option(None, "That of a recipe's first stage. Default: the method's.")

    def __post_init__(self) -> None:
        check_fields(self)
        _check_rate("first_learning_rate", self.first_learning_rate)
        object.__setattr__(self, "budget", str(self.budget))
        read_budget(self.budget)
        if self.recipe in (None, LP) and (self.first_epochs or self.first_learning_rate):
            raise SpecError(
                "first_epochs and first_learning_rate are those of a recipe's first stage; "
                "give --recipe lp-ft or eh-ft too"
            )


@dataclass(frozen=True)
class OptimConfig:
    """How the loss is made and descended. Steps are updates of the optimizer. Raises SpecError."""

    epochs: int | None = option(
        None, "Passes over the training data. Default: 3, more for fewer than 2,000 rows.", least=1
    )
    max_steps: int | None = option(None, "Stop after so many steps, whatever the epochs.", least=1)
    batch_size: int = option(32, "Examples a step.", least=1)
    bucket_batches: int = option(
        0, "Length bucketing: so many batches are sorted by length together and cut anew; 0: none.", least=0
    )
    learning_rate: float | None = option(None, "Highest learning rate. Default: the method's.")
    head_learning_rate: float | None = option(None, "Highest learning rate of the head. Default: the method's.")
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "How the learning rate falls.")
    warmup: float = option(0.06, "Share of the steps over which the learning rate rises.", least=0, most=1)
    weight_decay: float = option(0.01, "AdamW's; biases and LayerNorms have none.", least=0)
    beta2: float = option(0.999, "AdamW's second beta; the first is 0.9.", least=0, most=1)
    epsilon: float = option(1e-8, "AdamW's epsilon.", least=0)
    clip: float = option(1.0, "Longest gradient; 0: no clipping.", least=0)
    seed: int = option(0, "Decides the first weights, the order of examples and dropout.", least=0)
    loss: Literal["auto", "cosent", "mnrl", "mnrl-symmetric", "margin-mse", "distill"] = option(
        "auto",
        "embedding, sparse, multi-vector: cosent (scored pairs), mnrl (pairs, with hard negatives or without; "
        "-symmetric: both ways), margin-mse or distill (a teacher's scores). auto: as the records are.",
    )
    flops: float = option(
        0.0, "sparse: weight of the regulariser that makes vectors sparse (FLOPS), beside the loss.", least=0
    )
    balance: bool = option(
        False, "Weigh examples so that every label counts alike, however rare it is (classification, multi-label)."
    )
    label_smoothing: float = option(0.0, "Share of each target that is spread over all labels.", least=0, most=0.99)
    trunk_dropout: bool | None = option(
        None, "Whether the encoder's own dropout is active. Default: only where it is trained, without mixout."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        _check_rate("learning_rate", self.learning_rate)
        _check_rate("head_learning_rate", self.head_learning_rate)


@dataclass(frozen=True)
class EvalConfig:
    """When a run is measured, which state it keeps, and what it writes meanwhile. Raises SpecError."""

    eval_every: int | None = option(None, "Steps between evaluations. Default: one an epoch.", least=1)
    patience: int | None = option(None, "Stop after so many evaluations without a better one. Default: never.", least=1)
    keep: Literal["best", "last"] = option("best", "Which state is saved where there is evaluation data.")
    save_every: int = option(200, "Steps between checkpoints; one is written after each evaluation too.", least=1)
    folds: int | None = option(
        None,
        "Without --eval: so many parts of the training data are held out in turn; their metrics are told, and their "
        "answers calibrate the delta that is then trained on all. Default: none, and 3 for --method auto.",
        least=2,
    )
    gradient_steps: int = option(
        0, "First steps whose gradient's length is logged for every layer.", least=0, panel="Reports"
    )
    skip_bad: bool = option(
        False, "Leave out records that the task cannot read, and say which and why.", panel="Data and delta"
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class MachineConfig:
    """What a run takes of memory and time, with the same gradients. Raises SpecError."""

    max_tokens: int = option(
        4096, "Tokens a micro-batch; a batch of more is accumulated, with the same gradient.", least=1
    )
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        "bf16: on a GPU the encoder runs under autocast; on a CPU its frozen weights multiply in bfloat16, faster if "
        "the processor has that. auto: bf16 on GPUs that have it, else fp32.",
    )
    trunk_cache: bool = option(
        False,
        "Keep on disk what enters the lowest trained layer, and skip the frozen layers below it, whose dropout is then "
        "off, from the first step on.",
    )
    checkpointing: bool = option(
        False, "Keep for the backward pass only what enters each layer, and run the layers again there: less memory."
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class TrainConfig:
    """One training run, its settings in groups. ``TrainConfig.of("regression", "lora", epochs=5)`` takes them by name.

    A batch of ``batch_size`` examples is run in micro-batches of up to ``max_tokens`` packed rows, whose gradients add
    up to exactly that of the whole batch, so memory bounds ``max_tokens`` and nothing else. ``None`` means the default
    of the method, the task or the machine, as each field says. ``options`` holds fields of the methods' specs:
    ``{"lora": {"rank": 4}}``. Raises SpecError for settings that make no sense, alone or together.
    """

    task: str = field(
        metadata={"help": "What the delta answers: " + ", ".join(tasks.TASK_KINDS) + ".", "panel": "Task"},
    )
    method: tuple[str, ...] = option(
        (),
        "One kind of delta or several, with commas, or another method: " + ", ".join(METHODS) + ". Default: lora. "
        "auto tries several of them, together, and keeps the best.",
        panel="Method",
    )
    plan: RecipeConfig = field(default_factory=RecipeConfig, metadata={"panel": "Method"})
    form: FormConfig = field(default_factory=FormConfig, metadata={"panel": "Task"})
    optim: OptimConfig = field(default_factory=OptimConfig, metadata={"panel": "Optimisation"})
    eval: EvalConfig = field(default_factory=EvalConfig, metadata={"panel": "Evaluation and state"})
    machine: MachineConfig = field(default_factory=MachineConfig, metadata={"panel": "Machine"})
    options: Mapping[str, Values] = field(default_factory=dict)
    layers: tuple[str, ...] = option(
        (),
        "The layers that a delta changes, from 0: 4-5, or 0,3,5, or the upper ones, top:2 or top:1/3. What lies below "
        "the lowest is as it was: shared, and cheaper to train. Default: all.",
        panel="Method",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", _methods(self.method or DEFAULT_METHODS[self.plan.recipe]))
        check_known("task", self.task, tasks.TASK_KINDS)
        _check_recipe(self)
        given: Any = self.layers
        given = [given] if isinstance(given, int) else given
        object.__setattr__(self, "layers", tuple(split_list(given) if isinstance(given, str) else map(str, given)))
        _check_layers(self)
        if (self.optim.balance or self.optim.label_smoothing) and self.task not in tasks.LABEL_KINDS:
            raise SpecError(f"balance and label_smoothing are for {' and '.join(tasks.LABEL_KINDS)}, not {self.task}")
        if self.plan.budget != RecipeConfig.budget and AUTO not in self.method:
            method = ",".join(self.method)
            raise SpecError(f"budget is what a search may take, and the method is {method}; give --method auto")
        if self.eval.folds and (self.plan.recipe or self.full):
            own = self.plan.recipe or self.method[0]
            raise SpecError(f"folds share one frozen encoder, but {own} trains its own; leave them out")
        if self.optim.loss != "auto" and self.task not in tasks.VECTOR_KINDS:
            raise SpecError(
                f"loss {self.optim.loss} is for {', '.join(tasks.VECTOR_KINDS)}, not {self.task}; leave it out"
            )
        if self.form.labels and self.task not in tasks.NAMED_KINDS:
            raise SpecError(f"labels are for {', '.join(tasks.NAMED_KINDS)}, not {self.task}; leave them out")
        if self.optim.flops and self.task != tasks.SPARSE:
            raise SpecError(f"flops is for {tasks.SPARSE}, not {self.task}; leave it out")
        if self.form.width and self.task != tasks.MULTI_VECTOR:
            raise SpecError(f"width is for {tasks.MULTI_VECTOR}, not {self.task}; leave it out")
        if (self.form.label_texts or self.form.template != FormConfig.template) and self.task != tasks.ZERO_SHOT:
            raise SpecError(f"label_texts and template are for {tasks.ZERO_SHOT}, not {self.task}; leave them out")
        for name in self.options:
            if name not in self.method:
                raise SpecError(f"options of {name!r} were given, but the method is {','.join(self.method)}")
            if name in REGULARISED:
                read_options(name, self.options[name])
        _ = self.known_task

    @classmethod
    def of(cls, task: str = "", method: str | Iterable[str] = (), **settings: Any) -> "TrainConfig":
        """The configuration with these settings, the groups' by their names. SpecError for an unknown one, too."""
        if not task:
            raise SpecError(f"field 'task' is missing; expected one of {', '.join(tasks.TASK_KINDS)}")
        return nested(cls, {"task": task, "method": method, **settings}, "training has no field")

    def as_dict(self) -> "JsonObject":
        """All settings by name, ready for JSON; the inverse of ``of``."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat(self).items()}

    def replaced(self, **settings: Any) -> "TrainConfig":
        """The same configuration but for these settings, by name."""
        return TrainConfig.of(**{**self.as_dict(), **settings})

    @property
    def starts_at_probe(self) -> bool:
        """Whether the probe is solved first, and its head is where training begins."""
        plain = self.plan.recipe is None and self.plan.start != RANDOM and PROBE not in self.method
        return plain and self.task in SOLVED and self.form.head in (None, "linear") and self.form.aggregate == "mean"

    @property
    def stops_at_start(self) -> bool:
        """Whether a contrastive start is all of the training where there is no dev set: no steps were asked for."""
        return self.optim.epochs is None and self.optim.max_steps is None

    def passes(self, rows: int) -> int:
        """Epochs over that many rows: as given, or three, and more where those would be few steps."""
        return self.optim.epochs or min(MOST_EPOCHS, max(LEAST_EPOCHS, math.ceil(ENOUGH_ROWS / max(1, rows))))

    @property
    def solvable(self) -> bool:
        """Whether the head is one linear layer that gives a text its label or score, from the mean of its windows."""
        return self.task in SOLVED and self.known_task.head == "linear" and self.form.aggregate == "mean"

    @property
    def full(self) -> bool:
        """Whether the encoder itself is trained."""
        return self.method[0] == FULL or self.method[0] in REGULARISED

    @property
    def known_task(self) -> TaskSpec:
        """The task as far as it is known without data: labels may stand for others."""
        labelled = self.task in tasks.NAMED_KINDS and self.task != tasks.ZERO_SHOT
        return self.task_spec(("O",) if labelled and not self.form.labels else self.form.labels)

    def rate(self, method: str) -> float:
        """The highest learning rate of one method's parameters."""
        return LEARNING_RATES[method] if self.optim.learning_rate is None else self.optim.learning_rate

    @property
    def head_rate(self) -> float:
        """The highest learning rate of the head's parameters; the probe's is its learning rate."""
        if self.optim.head_learning_rate is not None:
            return self.optim.head_learning_rate
        return self.rate(PROBE) if self.method == (PROBE,) else HEAD_RATES.get(self.method[0], HEAD_RATE)

    def task_spec(self, labels: tuple[str, ...]) -> TaskSpec:
        """The task with its defaults filled in."""
        pooled, own = (
            self.task in tasks.POOLED_KINDS,
            self.task in (tasks.SPARSE, tasks.MULTI_VECTOR),
        )  # whose head has a form of its own
        probe = PROBE in self.method or self.plan.recipe == LP_FT or self.starts_at_probe
        longest = self.form.max_length or (384 if self.task == tasks.QUESTION_ANSWERING else TaskSpec.max_length)
        overlap = longest // 4 if self.form.long == "windows" else TaskSpec.stride
        return TaskSpec(
            self.task,
            labels=labels,
            max_length=longest,
            pooling=self.form.pooling or ("mean" if pooled or (probe and not own) else TaskSpec.pooling),
            width=(self.form.width or VECTOR_WIDTH) if self.task == tasks.MULTI_VECTOR else 0,
            max_terms=self.form.max_terms,
            skip_punctuation=self.form.skip_punctuation,
            head=self.form.head or ("none" if pooled else "linear" if probe and not own else TaskSpec.head),
            stride=overlap if self.form.stride is None else self.form.stride,
            max_answer_length=self.form.max_answer_length or TaskSpec.max_answer_length,
            abstain=self.form.abstain,
            long=self.form.long,
            aggregate=self.form.aggregate,
            dimensions=self.form.matryoshka,
            prompts=tuple(
                (role, prompt)
                for role, prompt in (("query", self.form.prompt_query), ("document", self.form.prompt_document))
                if prompt
            ),
            template=self.form.template,
        )


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
        check_known("method", name, METHODS)
    if len(set(names)) != len(names):
        raise SpecError(f"method {','.join(names)} names a kind twice; name each once")
    alone = [name for name in names if name in ALONE]
    if alone and len(names) > 1:
        raise SpecError(f"method {alone[0]!r} stands alone; got {','.join(names)}")
    return names


def _check_layers(config: "TrainConfig") -> None:
    """Raises SpecError where ``layers`` are no layers, or the method has none to choose."""
    read_layers(config.layers)
    for name in config.method if config.layers else ():
        if name in EVERYWHERE:
            raise SpecError(f"layers cannot be chosen for a {name}: {EVERYWHERE[name]}; leave --layers out")
        if name in SPECS:
            more = "; top-k says how many by --top-k" if name == TOP_K else ""
            raise SpecError(f"layers are those that a kind of delta changes, and the method is {name}{more}")


def _check_recipe(config: "TrainConfig") -> None:
    """Raises SpecError where a recipe and its method do not go together."""
    names = ",".join(config.method)
    if config.plan.recipe and AUTO in config.method:
        raise SpecError(f"recipe {config.plan.recipe} names what is trained, and method auto chooses it; leave one out")
    if config.plan.recipe == LP and (config.method != (PROBE,) or config.task not in SOLVED):
        raise SpecError(
            f"recipe lp solves a probe for {' or '.join(SOLVED)}; got method {names} and task {config.task}; "
            "leave --recipe out, or take lp-ft"
        )
    if config.plan.recipe == LP and config.form.aggregate != "mean":
        raise SpecError("recipe lp solves a probe on the mean of windows; leave --aggregate out")
    if config.plan.recipe == LP and config.form.head not in (None, "linear"):
        raise SpecError(f"recipe lp solves one linear layer; got head {config.form.head!r}; leave --head out")
    if config.plan.recipe == EH_FT and config.method[0] in ALONE:
        raise SpecError(f"recipe eh-ft begins with a delta, but the method is {names}; give lora, bitfit or another")
    if config.plan.start == CONTRASTIVE and (config.task != tasks.CLASSIFICATION or not config.starts_at_probe):
        own = f"recipe {config.plan.recipe}" if config.plan.recipe else f"method {names}"
        form = f"head {config.form.head or 'linear'} and aggregate {config.form.aggregate}"
        raise SpecError(
            "start contrastive is for a delta's linear head for classification, on the mean of windows; got task "
            f"{config.task}, {own}, {form}; leave it out"
        )
    if config.plan.start == CONTRASTIVE and config.full:
        raise SpecError(f"start contrastive trains a delta, and {names} trains the encoder; leave it out")
    if config.plan.recipe == LP_FT and config.method == (PROBE,):
        raise SpecError("recipe lp-ft begins with the probe, and goes on with another method; expected full or another")
