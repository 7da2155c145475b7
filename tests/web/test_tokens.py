"""Words, tokens and where they stand: as Python and the tokenizers library have them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bertology_serve.examples import path as examples
from bertology_serve.tasks.encoding import encode_text, encode_words
from bertology_serve.tasks.token_classification import split_words
from tests.web.conftest import HERE

TEXTS = [
    "Ada met the dog in Paris, early.",
    "  Zürich's naïve café — don't  we'll 'tis (a.b.) U.S.A. 1,234.5 3.14.15 @ada #x_y http://a.b/c?d=e, x-ray x--y ",
    "ΟΔΟΣ Σίσυφος Σ, İstanbul ﬁne ½ x² ①",
    "東京タワーは高い。 한국어 텍스트 ไทย हिन्दी का वाक्य עִבְרִית العَرَبِيَّة",
    "e\u0301te\u0301 n\u0303o \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 a\u200bb",
    "\u00a0\u2003c\td\n\ne \ufeff \x07 \ufffd \x1c \x85 x",
    "x" * 120 + " supercalifragilistic antidisestablishmentarianism " + "ab" * 60,
    "⟨math⟩ x≤y ≠ ∑ “quoted” \u2018single\u2019 …",
]


def trained(pre: Any, post: Any, normal: Any, model: Any, trainer: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of the package's own sentences."""
    raw = Tokenizer(model)
    raw.pre_tokenizer = pre
    if normal is not None:
        raw.normalizer = normal
    lines = examples("sentiment", "train").read_text(encoding="utf-8").splitlines()
    raw.train_from_iterator([json.loads(line)["text"] for line in lines] + TEXTS, trainer)
    raw.post_processor = post(raw)
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def roberta() -> PreTrainedTokenizerFast:
    def post(raw: Tokenizer) -> Any:
        sides = [(name, raw.token_to_id(name)) for name in ("</s>", "<s>")]
        return processors.RobertaProcessing(*sides, add_prefix_space=False)

    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False), post, None, models.BPE(), trainer)


def template(raw: Tokenizer) -> Any:
    sides = [(name, raw.token_to_id(name)) for name in ("<s>", "</s>")]
    return processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=sides)


def modernbert() -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False), template, normalizers.NFC(), models.BPE(), trainer)


def sentencepiece() -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=SPECIAL, unk_token="<unk>")
    return trained(pre_tokenizers.Metaspace(), template, normalizers.NFKC(), models.Unigram(), trainer)


@pytest.mark.parametrize("name", ["minilm", "roberta", "modernbert", "sentencepiece"])
def test_as_the_tokenizers_library(name: str, built: Path, minilm_path: Path, tmp_path: Path):
    made = {"roberta": roberta, "modernbert": modernbert, "sentencepiece": sentencepiece}
    tokenizer = made[name]() if name in made else AutoTokenizer.from_pretrained(minilm_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    command = ["node", HERE / "tokens.mjs", built / "dist", tmp_path, tmp_path / "texts.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for text, found in zip(TEXTS, json.loads(done.stdout), strict=True):
        words = split_words(text)
        assert found["words"] == [[*span] for span in words], text
        assert found["ids"] == [*encode_text(tokenizer, text, None, 10_000).ids], text
        assert found["pair"] == [*encode_text(tokenizer, "one two", text, 10_000).ids], text
        apart = encode_words(tokenizer, [text[start:end] for start, end in words], [0] * len(words), 10_000)
        assert found["apart"] == [*apart.ids], text
        if name == "sentencepiece":
            assert found["places"].startswith("Unsupported: answers in texts need WordPiece or bytes"), text
            continue
        pair = encode_text(tokenizer, "one", text, 10_000, offsets=True)
        expected = [span for span, part in zip(pair.offsets, pair.parts, strict=True) if part == 1]
        assert [stripped(text, *span) for span in found["places"]] == [stripped(text, *span) for span in expected], text


def stripped(text: str, start: int, end: int) -> tuple[int, int]:
    """A token's place without white space, which answers in texts leave out."""
    part = text[start:end]
    return (start + len(part) - len(part.lstrip()), start + len(part.rstrip())) if part.strip() else (0, 0)
