from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from bertology_serve.errors import SpecError
from bertology_serve.kinds.kinds import KINDS, kind_of
from bertology_serve.kinds.sparse import SPARSE
from bertology_serve.tasks.spec import TASK_KINDS
from bertology_serve.training.method_options import AUTO, REGULARISED, KindFlags
from bertology_serve.training.methods import specs_for
from bertology_serve.training.train_config import (
    FULL,
    HEAD_RATE,
    HEAD_RATES,
    LEARNING_RATES,
    METHODS,
    PROBE,
    EvalConfig,
    FormConfig,
    MachineConfig,
    OptimConfig,
    RecipeConfig,
    TrainConfig,
)
from tests.deltas import samples


def test_methods_are_the_kinds_the_probe_and_the_forms_of_full_fine_tuning():
    trainable = [kind for kind in KINDS if kind != SPARSE.name]  # compress makes those
    assert (*trainable, PROBE, FULL, *REGULARISED, AUTO) == METHODS
    assert {*LEARNING_RATES, AUTO} == set(METHODS)


def test_survives_json():
    config = TrainConfig.of("classification", "lora,bitfit", labels=("a", "b"), options={"lora": {"rank": 2}})
    assert TrainConfig.of(**json.loads(json.dumps(config.as_dict()))) == config


def test_nested_and_flat_forms_are_one():
    flat = {"task": "regression", "method": ["lora"], "epochs": 5, "start": "random", "max_length": 9, "patience": 2,
            "precision": "fp32", "options": {"lora": {"rank": 2}}}  # fmt: skip
    made = TrainConfig(
        "regression", ("lora",), RecipeConfig(start="random"), FormConfig(max_length=9), OptimConfig(epochs=5),
        EvalConfig(patience=2), MachineConfig(precision="fp32"), {"lora": {"rank": 2}},
    )  # fmt: skip
    assert TrainConfig.of(**flat) == made
    assert flat.items() <= made.as_dict().items()
    assert made.replaced(epochs=6, patience=None).as_dict() == {**made.as_dict(), "epochs": 6, "patience": None}


@pytest.mark.parametrize("group", [RecipeConfig, FormConfig, OptimConfig, EvalConfig, MachineConfig])
def test_every_number_of_a_group_is_checked(group):
    """By its metadata: a value below the least, a NaN, and a word are refused."""
    for one in fields(group):
        for wrong in (one.metadata["least"] - 1, float("nan"), "x") if "least" in one.metadata else ():
            with pytest.raises(SpecError, match=f"{one.name} is {wrong!r}; expected a number from"):
                group(**{one.name: wrong})


def test_unknown_key_names_the_nearest():
    with pytest.raises(SpecError, match="no field 'epoch'; did you mean 'epochs'"):
        TrainConfig.of(**{"task": "regression", "epoch": 2})
    with pytest.raises(SpecError, match="field 'task' is missing"):
        TrainConfig.of(**{})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "classfication"}, "unknown task 'classfication'; did you mean 'classification'"),
        ({"method": "lore"}, "unknown method 'lore'; did you mean 'lora'"),
        ({"method": "lora,lora"}, "names a kind twice"),
        ({"method": "full,lora"}, "'full' stands alone"),
        ({"method": "lora,"}, "unknown method ''"),
        ({"epochs": 0}, "epochs is 0; expected a number from 1 up"),
        ({"warmup": 1.5}, "warmup is 1.5; expected a number from 0 to 1"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001"),
        ({"clip": float("nan")}, "clip is nan"),
        ({"schedule": "linaer"}, "did you mean 'linear'"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"max_length": 2}, "max_length is 2"),
        ({"head": "none"}, "head 'none' does not fit"),
        ({"labels": ("a", "a")}, "labels repeat"),
        ({"method": "mixout,lora"}, "'mixout' stands alone"),
        ({"method": "mixout", "options": {"mixout": {"p": 1.0}}}, "p is 1.0; expected a number from 0 up to"),
        ({"method": "mixout", "options": {"mixout": {"q": 1.0}}}, "mixout has no field 'q'; known: p"),
        ({"method": "child-tuning", "options": {"child-tuning": {"mode": "g"}}}, "unknown mode 'g' of child-tuning"),
        (
            {"method": "child-tuning", "options": {"child-tuning": {"share": 0}}},
            "share is 0; expected a number above 0",
        ),
        ({"method": "top-k", "options": {"top-k": {"layers": 0}}}, "layers of top-k is 0; expected a whole number"),
        ({"options": {"bitfit": {"biases": "all"}}}, "options of 'bitfit' were given, but the method is lora"),
    ],
)
def test_senseless_values_are_refused(values, message):
    with pytest.raises(SpecError, match=message):
        TrainConfig.of(**{"task": "classification", **values})


def test_defaults_depend_on_the_task():
    assert TrainConfig.of("question-answering").task_spec(()).max_length == 384
    spec = TrainConfig.of("embedding").task_spec(())
    assert (spec.pooling, spec.head, spec.max_length) == ("mean", "none", 128)
    spec = TrainConfig.of("regression", "probe").task_spec(())
    assert (spec.pooling, spec.head) == ("mean", "linear")
    assert (TrainConfig.of("regression").known_task.pooling, TrainConfig.of("regression").known_task.head) == (
        "mean",
        "linear",
    )
    spec = TrainConfig.of("regression", start="random").task_spec(())
    assert (spec.pooling, spec.head) == ("cls", "hf")
    assert TrainConfig.of("regression", stride=3, max_answer_length=4, max_length=9).task_spec(()).stride == 3


def test_learning_rate_is_the_method_s_unless_given():
    assert TrainConfig.of("regression").rate("lora") == 1e-3
    assert TrainConfig.of("regression", learning_rate=0.5).rate("prompt") == 0.5


def test_method_defaults_to_what_the_recipe_needs():
    methods = [TrainConfig.of("regression", recipe=recipe).method for recipe in (None, "lp-ft", "eh-ft")]
    assert methods == [("lora",), ("full",), ("lora",)]


def test_head_has_a_learning_rate_of_its_own():
    assert TrainConfig.of("regression", learning_rate=0.5).head_rate == HEAD_RATE
    assert TrainConfig.of("regression", "full").head_rate == HEAD_RATES[FULL]
    assert TrainConfig.of("regression", "probe", learning_rate=0.5).head_rate == 0.5
    assert TrainConfig.of("regression", "probe").head_rate == LEARNING_RATES[PROBE]
    assert TrainConfig.of("regression", head_learning_rate=0.25).head_rate == 0.25


def test_flags_become_specs():
    flags = KindFlags(rank=2, targets=("key",), adapter_width=3, prompt_placement="before_cls", vera_layers=(0, 1))
    config = TrainConfig.of("regression", "prompt,lora,adapter,vera", options=flags.by_kind())
    prompt, lora, adapter, vera = specs_for(config, samples.anatomy("bert"))
    assert (lora.rank, lora.targets, lora.layers, lora.alpha) == (2, ("key",), None, 16.0)
    assert (adapter.width, prompt.placement) == (3, "before_cls")
    assert vera.layers == (0, 1)
    assert specs_for(TrainConfig.of("regression", "probe"), samples.anatomy("bert")) == ()


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        (2, (2,)),
        ("1-2", (1, 2)),
        ("2,0", (0, 2)),
        ("0,1-2", (0, 1, 2)),
        ("top:2", (1, 2)),
        ("top:1/3", (2,)),
        ((0, 2), (0, 2)),
        ("", None),
    ],
)
def test_layers_are_for_every_kind(given: Any, layers: tuple[int, ...] | None):
    config = TrainConfig.of("regression", "lora,bitfit,adapter,ia3,norms,vera", layers=given)
    assert [spec.layers for spec in specs_for(config, samples.anatomy("bert"))] == [layers] * 6
    assert TrainConfig.of(**config.as_dict()) == config
    own = config.replaced(options={"lora": {"layers": (1,)}, "ia3": {"layers": None}})
    found = {kind_of(spec).name: spec.layers for spec in specs_for(own, samples.anatomy("bert"))}
    assert (found["lora"], found["ia3"]) == ((1,), layers)


@pytest.mark.parametrize(
    ("method", "layers", "message"),
    [
        ("lora", "4-x", "layers is '4-x'; expected numbers from 0 and ranges with commas"),
        ("lora", "top:1/0", "expected numbers from 0"),
        ("lora", "top:4/3", "expected numbers from 0"),
        ("lora", "top:0", "expected numbers from 0"),
        ("lora", "5-4", "expected numbers from 0"),
        ("lora,prompt", "1", "cannot be chosen for a prompt: its vectors enter the first layer"),
        ("full", "1", "the method is full"),
        ("top-k", "top:1", "top-k says how many by --top-k"),
        ("probe", "1", "the method is probe"),
    ],
)
def test_layers_that_cannot_be_chosen_are_refused(method: str, layers: str, message: str):
    with pytest.raises(SpecError, match=message):
        TrainConfig.of("regression", method, layers=layers)


@pytest.mark.parametrize("layers", ["3", "2-3", "top:4"])
def test_layers_that_are_not_there_are_refused(layers: str):
    config = TrainConfig.of("regression", layers=layers)
    with pytest.raises(SpecError, match=f"layers is '{layers}'; the encoder has 3 layers, 0 to 2"):
        specs_for(config, samples.anatomy("bert"))


def test_every_flag_is_a_field_of_its_kind():
    for flag in fields(KindFlags):
        kind = flag.metadata["kind"]
        spec = REGULARISED[kind] if kind in REGULARISED else KINDS[kind].spec
        assert flag.metadata["field"] in {field.name for field in fields(spec)}


def test_imports_no_torch():
    names = "method_options, train_config"
    code = f"import sys; from bertology_serve.training import {names}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("rate", [0, -1, 10, 1e6])
def test_a_rate_that_is_refused_lies_outside_of_what_is_said_to_be_expected(rate: float):
    with pytest.raises(SpecError, match="above 0 and below 10"):
        TrainConfig.of("classification", learning_rate=rate)


@pytest.mark.parametrize("task", TASK_KINDS)
def test_labels_are_refused_where_a_task_has_none(task: str) -> None:
    if task in ("classification", "multi-label", "token-classification", "zero-shot"):
        assert TrainConfig.of(task, labels=["a", "b"]).form.labels == ("a", "b")
    else:
        with pytest.raises(SpecError, match=f"labels are for classification, .*, not {task}; leave them out"):
            TrainConfig.of(task, labels=["a", "b"])
