from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bertology_serve.deltas.layout import adapter_config, modules_to_save, obstacle
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import TaskSpec
from tests.deltas import samples


def config(family: str, spec: Any, task: TaskSpec = samples.CLASSES) -> dict[str, Any]:
    delta = samples.delta(family, [spec], task)
    assert obstacle(delta, samples.anatomy(family), samples.options(family)) == ""
    return adapter_config(delta, samples.anatomy(family), samples.options(family))


@pytest.mark.parametrize(
    ("family", "targets", "named"),
    [
        ("bert", ("query", "value"), ["query", "value"]),
        ("distilbert", ("query", "down"), ["q_lin", "lin2"]),
        ("modernbert", ("query", "value"), ["Wqkv"]),
        ("mpnet", ("value",), ["v"]),
        ("deberta-v3", ("key",), ["key_proj"]),
        ("bert", ("output",), [f"bert.encoder.layer.{i}.attention.output.dense" for i in range(3)]),
    ],
)
def test_targets_are_named_as_people_do_where_that_is_exact(
    family: str, targets: tuple[str, ...], named: list[str]
) -> None:
    assert config(family, Lora(targets))["target_modules"] == named


def test_chosen_layers_have_full_names() -> None:
    values = config("bert", Lora(("query",), layers=(1,)), samples.VECTORS)
    assert values["target_modules"] == ["encoder.layer.1.attention.self.query"]
    assert values["task_type"] == "FEATURE_EXTRACTION"


@pytest.mark.parametrize(("rslora", "alpha"), [(False, 16.0), (True, 9.0)])
def test_the_scale_stays_where_slots_share_a_module(rslora: bool, alpha: float) -> None:
    spec = Lora(("query", "value", "output"), rank=4, alpha=alpha, rslora=rslora)
    values = config("modernbert", spec)
    assert (values["r"], values["lora_alpha"]) == (4, alpha)
    for layer in range(3):
        name = f"model.layers.{layer}.attn.Wqkv"
        rank, shared = values["rank_pattern"][name], values["alpha_pattern"][name]
        assert rank == 8
        assert shared / (rank**0.5 if rslora else rank) == pytest.approx(spec.scale, rel=1e-12)


def test_heads_are_listed_by_module() -> None:
    assert modules_to_save(samples.delta("roberta", ()).head) == ["classifier"]
    assert modules_to_save(samples.delta("bert", ()).head) == ["bert.pooler.dense", "classifier"]
    assert modules_to_save(samples.delta("modernbert", ()).head) == ["head.dense", "head.norm", "classifier"]
    assert modules_to_save([]) == []


def test_questions_of_families_with_token_types_take_the_plain_model() -> None:
    assert config("bert", Lora(), samples.ANSWERS)["task_type"] is None
    assert config("roberta", Lora(), samples.ANSWERS)["task_type"] == "QUESTION_ANS"


@pytest.mark.parametrize(
    ("family", "kind", "task", "reason"),
    [
        ("bert", "probe", samples.CLASSES, "no single method for probe"),
        ("bert", "all", samples.CLASSES, "no single method for lora, bitfit, adapter, prompt, prefix"),
        ("bert", "bitfit", samples.CLASSES, "linear projections only"),
        ("bert", "houlsby", samples.CLASSES, "no adapter"),
        ("bert", "prompt", samples.CLASSES, "no prompt in this way"),
        ("bert", "prefix", samples.CLASSES, "no prefix in this way"),
        ("bert", "prompt-peft", samples.TAGS, "rows among the text's"),
        ("bert", "prompt-peft", samples.VECTORS, "rows among the text's"),
        ("modernbert", "prefix-peft", samples.CLASSES, "no prefixes on modernbert"),
        ("deberta-v3", "prefix-peft", samples.CLASSES, "no prefixes on deberta-v2"),
        ("bert", "prefix-peft", samples.CHOICE, "no prefixes on bert for multiple-choice"),
        ("bert", "prefix-peft", samples.ANSWERS, "drops the token types"),
        ("bert", "lora", replace(samples.CLASSES, pooling="mean"), "reads cls there, not mean"),
        ("bert", "lora", replace(samples.CLASSES, head="linear"), "no linear head"),
    ],
)
def test_what_peft_does_not_compute_is_said(family: str, kind: str, task: TaskSpec, reason: str) -> None:
    delta = samples.delta(family, samples.SPECS[kind], task)
    assert reason in obstacle(delta, samples.anatomy(family), samples.options(family))


def test_modernbert_reads_the_rows_that_its_configuration_says() -> None:
    delta = samples.delta("modernbert", samples.SPECS["lora"], replace(samples.CLASSES, pooling="mean"))
    assert "reads cls" in obstacle(delta, samples.anatomy("modernbert"), {})
    assert not obstacle(delta, samples.anatomy("modernbert"), {"classifier_pooling": "mean"})
    prompt = samples.delta("modernbert", samples.SPECS["prompt-peft"], replace(samples.CLASSES, pooling="mean"))
    reason = obstacle(prompt, samples.anatomy("modernbert"), {"classifier_pooling": "mean"})
    assert "rows among the text's" in reason  # peft's mean is of both


def test_a_family_whose_head_is_not_known_has_no_configuration_but_for_embeddings() -> None:
    anatomy = replace(samples.anatomy("bert"), family="luke")
    assert "luke" in obstacle(samples.delta("bert", samples.SPECS["lora"]), anatomy, {})
    assert not obstacle(samples.delta("bert", samples.SPECS["lora"], samples.VECTORS), anatomy, {})
