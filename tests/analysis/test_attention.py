"""Attention statistics against transformers' own maps in float64, written out naively."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from transformers import AutoModel

from bertology_serve.analysis.attention_heads import attention
from bertology_serve.analysis.settings import AttentionSettings
from bertology_serve.analysis.subject_model import Subject
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import SpecError, Unsupported
from bertology_serve.families import compat
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny

TEXTS = [
    "Ada met the cat in Paris .",
    "the film was good",
    "the house was bad ! what is not very great in London ? who went to the river bank",
    "a red dog and a blue cat",
]
TASK = TaskSpec("classification", ("a", "b"), max_length=32)


def naive_maps(model: torch.nn.Module, encoder: Encoder) -> list[np.ndarray]:
    """[L, heads, n, n] float64 of each text, as transformers gives them."""
    maps = []
    for text in TEXTS:
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            found = model(input_ids=ids, output_attentions=True).attentions
        maps.append(torch.stack([layer[0] for layer in found]).double().numpy())
    return maps


def own_model(directory: Path) -> torch.nn.Module:
    return AutoModel.from_pretrained(directory, attn_implementation="eager").eval().double()


def naive(maps: list[np.ndarray], encoder: Encoder) -> dict[tuple[int, int], dict[str, float]]:
    """Every statistic of every head, one attention weight at a time."""
    tokenizer = encoder.tokenizer
    sums: dict[tuple[int, int], dict[str, float]] = {}
    rows = 0
    for text, whole in zip(TEXTS, maps, strict=True):
        ids = tokenizer(text)["input_ids"]
        rows += len(ids)
        for layer, head in np.ndindex(whole.shape[:2]):
            own = sums.setdefault((layer, head), dict.fromkeys(("entropy", "distance", "cls", "sep", "next", "previous",
                                                               "same"), 0.0))  # fmt: skip
            for i, row in enumerate(whole[layer, head]):
                for j, weight in enumerate(row):
                    own["entropy"] -= weight * math.log2(weight) if weight > 0 else 0.0
                    own["distance"] += weight * abs(i - j)
                    own["cls"] += weight * (ids[j] == tokenizer.cls_token_id)
                    own["sep"] += weight * (ids[j] == tokenizer.sep_token_id)
                    own["next"] += weight * (j == i + 1)
                    own["previous"] += weight * (j == i - 1)
                    own["same"] += weight * (j == i)
    return {key: {name: value / rows for name, value in own.items()} for key, own in sums.items()}


def compare(found: list, expected: dict) -> None:
    assert len(found) == len(expected)
    for row in found:
        own = expected[row["layer"], row["head"]]
        assert {name: row[name] for name in own} == pytest.approx(own, abs=2e-6, rel=2e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_statistics_equal_a_naive_computation(family: str, tmp_path: Path) -> None:
    encoder = tiny.encoder(family, tmp_path)
    report = attention(encoder, TEXTS)
    compare(report.tables["heads"], naive(naive_maps(own_model(tmp_path), encoder), encoder))


def test_divergences_equal_scipys(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    report = attention(encoder, TEXTS)
    maps = [whole.reshape(-1, *whole.shape[2:]) for whole in naive_maps(own_model(tmp_path), encoder)]
    expected = []
    for i in range(12):
        for j in range(i + 1, 12):
            rows = [jensenshannon(p, q, base=2) ** 2 for whole in maps for p, q in zip(whole[i], whole[j], strict=True)]
            expected.append(sum(rows) / len(rows))
    found = [pair["divergence"] for pair in report.tables["divergences"]]
    assert found == pytest.approx(expected, abs=1e-6)
    assert max(expected) > 1e-3


def test_divergences_are_measured_on_a_part_of_a_long_corpus(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    report = attention(encoder, TEXTS * 8, AttentionSettings(js_rows=60))
    assert 0 < report.facts["divergence_rows"] < report.facts["tokens"]


def test_a_delta_is_applied(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    delta = tiny.delta(encoder, "d", [Lora(("query", "key"), rank=2, alpha=4)], TASK, size=0.5)
    own = own_model(tmp_path)
    update = delta.effects(encoder.anatomy).low_rank
    for layer in range(3):
        projections = own.encoder.layer[layer].attention.self
        for name in ("query", "key"):
            weight = getattr(projections, name).weight
            weight.data += (update[name].b[layer].T @ update[name].a[layer]).double()
    expected = naive(naive_maps(own, encoder), encoder)
    compare(attention(Subject(encoder, delta), TEXTS).tables["heads"], expected)
    base = attention(encoder, TEXTS).tables["heads"]
    assert any(abs(row["entropy"] - expected[row["layer"], row["head"]]["entropy"]) > 1e-2 for row in base)


@pytest.mark.parametrize("spec", [Prefix(length=3), Prompt(length=3)])
def test_virtual_rows_have_a_share_of_their_own(spec: object, tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    delta = tiny.delta(encoder, "d", [spec], TASK)
    report = attention(encoder, TEXTS, delta=delta)
    assert all(0.01 < row["virtual"] < 0.9 for row in report.tables["heads"])
    assert "virtual" not in attention(encoder, TEXTS).tables["heads"][0]


def test_batches_change_nothing(tmp_path: Path) -> None:
    encoder = tiny.encoder("modernbert", tmp_path)
    one, many = (attention(encoder, TEXTS, AttentionSettings(max_tokens=n)) for n in (1, 4096))
    for a, b in zip(one.tables["heads"], many.tables["heads"], strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_report_is_written(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path / "bert")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXTS) + "\n\n")
    seen = []
    report = attention(encoder, corpus, advance=lambda done, total: seen.append((done, total)))
    names = {path.name for path in report.save(tmp_path / "out")}
    assert names == {"attention.json", "attention.html", "attention-heads.csv", "attention-divergences.csv",
                     "attention-heads.png", "attention-clusters.png"}  # fmt: skip
    held = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert held["tables"]["heads"] == report.tables["heads"]
    panel = held["figures"]["heads"]["panels"][0]
    assert panel["values"][2][1] == held["tables"]["heads"][2 * 4 + 1]["entropy"]
    page = (tmp_path / "out" / "attention.html").read_text()
    assert f"layer 2, head 1: {panel['values'][2][1]:.4g} (bits)" in page
    assert "http" not in page.replace("http-equiv", "")
    assert seen[-1] == (4, 4)


def test_an_encoder_with_its_own_attention_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "connect", lambda *_: False)
    encoder = tiny.encoder("bert", tmp_path)
    with pytest.raises(Unsupported, match="own attention"):
        attention(encoder, TEXTS)


def test_settings_are_checked() -> None:
    with pytest.raises(SpecError, match="clusters is 0"):
        AttentionSettings(clusters=0)
