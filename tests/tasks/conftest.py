from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CORPUS = ["The quick brown fox jumped over thirteen lazy dogs", "Ada Lovelace was unbelievable in Paris !"]


@pytest.fixture(scope="session")
def minilm(minilm_path):
    """The tokenizer of the packaged MiniLM: WordPiece, lower case."""
    return AutoTokenizer.from_pretrained(minilm_path)


@pytest.fixture(scope="session")
def real_data():
    """Reads a real data set, first rows only: ``real_data("squad", "dev", 20)``; skips where there is none."""
    root = Path(os.environ.get("BERTOLOGY_DATA", Path(__file__).parents[2].parent / "shared" / "data"))

    def read(name, split, rows):
        path = root / name / f"{split}.jsonl.gz"
        if not path.exists():
            pytest.skip(f"no real data at {path}")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [(json.loads(line), f"{name}:{row}") for row, line in zip(range(1, rows + 1), file, strict=False)]

    return read


@pytest.fixture(scope="session")
def byte_level():
    """RoBERTa's kind of tokenizer: byte-level BPE, offsets trimmed, no token types."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=["input_ids", "attention_mask"])
