"""Faults of peft 0.21.2 that do not occur here. Where it is quick to show, the test shows the fault too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from bertology_serve.deltas import store
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.deltas import samples

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*", "ignore:Token type ids.*")
TEXT = "the cat was very good"
TWO = TaskSpec("classification", ("no", "yes"), 32)


def logits(encoder: Encoder, deltas: list[Delta], *requests: Request) -> list[Tensor]:
    """What one mixed batch answers."""
    pipeline = Pipeline(encoder)
    for delta in deltas:
        pipeline.add(delta)
    answers = pipeline.run([pipeline.prepare(request) for request in requests])
    return [torch.tensor(answer.answer["logits"]) for answer in answers]


def ask(name: str, **record: Any) -> Request:
    return Request(name, record or {"text": TEXT}, logits=True)


def check_mixed_is_solo(encoder: Encoder, deltas: list[Delta]) -> None:
    """Each delta answers in the mixed batch as alone, and no two answer alike."""
    mixed = logits(encoder, deltas, *(ask(delta.name) for delta in deltas))
    for delta, found in zip(deltas, mixed, strict=True):
        torch.testing.assert_close(found, logits(encoder, [delta], ask(delta.name))[0], atol=1e-4, rtol=0)
        silent = Delta(delta.name, delta.base, delta.task, head=delta.head)
        assert (found - logits(encoder, [silent], ask(delta.name))[0]).abs().max() > 1e-3


@torch.no_grad()
def test_the_pooler_that_the_base_lacks_is_saved(tmp_path: Path) -> None:
    """peft issue 2171: DeBERTa's pooler is random, frozen and not saved, so that a reload answers otherwise."""
    encoder = tiny.encoder("deberta-v3", tmp_path / "base")

    def fresh(seed: int) -> Any:
        torch.manual_seed(seed)
        auto = transformers.AutoModelForSequenceClassification
        return auto.from_pretrained(tmp_path / "base", num_labels=3).eval()

    ids = torch.tensor([encoder.tokenizer(TEXT).input_ids])
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(fresh(0), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    reloaded = peft.PeftModel.from_pretrained(fresh(1), str(tmp_path / "theirs")).eval()
    assert (theirs(input_ids=ids).logits - reloaded(input_ids=ids).logits).abs().max() > 1e-3

    delta = tiny.delta(encoder, "x", [Lora()], samples.CLASSES)
    store.save(delta, tmp_path / "ours", encoder.anatomy, encoder.config.to_dict())
    expected = logits(encoder, [delta], ask("x"))[0]
    for seed in range(2):
        model = peft.PeftModel.from_pretrained(fresh(seed), str(tmp_path / "ours")).eval()
        torch.testing.assert_close(model(input_ids=ids).logits[0], expected, atol=1e-4, rtol=0)


def test_every_kind_keeps_to_its_own_rows_of_a_mixed_batch(tmp_path: Path) -> None:
    """peft ignores ``adapter_names`` for BEFT and prefixes without a word: every row gets the active adapter."""
    encoder = tiny.encoder("bert", tmp_path)
    specs: list[Any] = [Prefix(3), Prefix(2), Bitfit("attention"), Bitfit(), Prompt(2)]
    made = [tiny.delta(encoder, f"d{i}", [spec], samples.CLASSES, i, 0.3) for i, spec in enumerate(specs)]
    check_mixed_is_solo(encoder, made)


def test_composite_heads_and_label_counts_mix(tmp_path: Path) -> None:
    """peft raises for RoBERTa's composite head in a mixed batch, and for two numbers of labels."""
    encoder = tiny.encoder("roberta", tmp_path)
    made = [tiny.delta(encoder, f"d{i}", [Lora()], task, i, 0.3) for i, task in enumerate((TWO, samples.CLASSES))]
    check_mixed_is_solo(encoder, made)


def test_a_prompt_leaves_text_positions_and_token_logits_as_they_are(tmp_path: Path) -> None:
    """peft shifts the text, so that V + T beyond the positions crashes, and gives logits for virtual tokens too."""
    encoder = tiny.encoder("bert", tmp_path)
    longest = encoder.max_tokens
    task = TaskSpec("token-classification", ("O", "B"), longest)
    delta = tiny.delta(encoder, "x", [Prompt(5)], task)
    words = ["cat"] * (longest - 2)
    assert logits(encoder, [delta], ask("x", tokens=words))[0].shape == (longest, 2)

    config = peft.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=5)
    model = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path)
    model = peft.get_peft_model(model, config).eval()
    ids = torch.full((1, encoder.anatomy.max_tokens), 7)
    with pytest.raises((RuntimeError, IndexError)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert model(input_ids=ids[:, :4], attention_mask=torch.ones(1, 4)).logits.shape[1] == 4 + 5


@pytest.mark.parametrize("family", ["modernbert", "mpnet", "deberta-v3"])
def test_prefixes_work_where_peft_fails_or_ignores_them(tmp_path: Path, family: str) -> None:
    encoder = tiny.encoder(family, tmp_path)
    check_mixed_is_solo(encoder, [tiny.delta(encoder, "x", [Prefix(3)], samples.CLASSES, size=0.5)])


@torch.no_grad()
def test_token_types_reach_the_encoder_for_questions(tmp_path: Path) -> None:
    """``PeftModelForQuestionAnswering.forward`` takes token types and passes them to nobody."""
    encoder = tiny.encoder("bert", tmp_path / "base")
    delta = tiny.delta(encoder, "x", [Lora()], samples.ANSWERS)
    store.save(delta, tmp_path / "x", encoder.anatomy, encoder.config.to_dict())
    tokens = encoder.tokenizer("who ?", "the dog", return_tensors="pt")
    assert tokens.token_type_ids.any()
    ours = logits(encoder, [delta], ask("x", question="who ?", context="the dog"))[0]

    auto = transformers.AutoModelForQuestionAnswering
    plain = peft.PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), str(tmp_path / "x")).eval()
    torch.testing.assert_close(plain(**tokens).start_logits[0], ours[:, 0], atol=1e-4, rtol=0)
    config = peft.LoraConfig(task_type="QUESTION_ANS", target_modules=["key"])
    faulty = peft.get_peft_model(auto.from_pretrained(tmp_path / "base"), config).eval()
    untyped = faulty(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    assert torch.equal(faulty(**tokens).start_logits, untyped.start_logits)
