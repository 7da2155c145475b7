from __future__ import annotations

from dataclasses import replace

import yaml

from bertology_serve.deltas.store import model_card
from bertology_serve.tasks.spec import TaskSpec
from tests.deltas import samples


def test_the_card_states_what_the_delta_is() -> None:
    delta = replace(samples.delta("bert", samples.SPECS["lora"]), metrics={"accuracy": 0.81234}, provenance={"seed": 3})
    text = model_card(delta, "")
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "peft"
    assert front["pipeline_tag"] == "text-classification"
    assert front["base_model"] == "tiny-bert"
    assert "1,152 and 1,155 of the head" in text  # 3 layers x 2 slots x 3 (32 + 32); 33 x 32 of the pooler and 33 x 3
    assert "`accuracy` | 0.8123" in text
    assert "loads in peft too" in text


def test_the_card_says_why_peft_does_not_load_it() -> None:
    text = model_card(samples.delta("bert", samples.SPECS["houlsby"]), "peft has no adapters")
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "bertology-serve"
    assert "peft does not load it: peft has no adapters." in text


def test_hostile_texts_do_not_leave_their_place() -> None:
    labels = ("a`b|c", "x\n# y", *(f"l{i}" for i in range(30)))
    task = TaskSpec("classification", labels, 32)
    delta = samples.delta("bert", (), task)
    base = replace(delta.base, name="x\n```\n# evil")
    delta = replace(delta, base=base, provenance={"note": "```\n# out"})
    text = model_card(delta, "x")
    assert "`a'b¦c`, `x # y`" in text
    assert "and 12 more" in text
    body = text.split("---", 2)[2]
    assert body.count("\n```") == 4
    assert "\n# evil" not in text
