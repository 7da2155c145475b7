from __future__ import annotations

import threading
from pathlib import Path

import torch

from bertology_serve.encoder.delta_set import RowCache
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny

SPEC = TaskSpec("zero-shot", ("good", "bad"), 32, "mean", "none")


def test_the_least_recently_used_leave_first():
    cache = RowCache(most_rows=3)
    cache.keep({name: torch.zeros(2) for name in "abc"})
    assert list(cache.known("xa")) == ["a"]
    cache.keep({"d": torch.ones(2)})
    assert cache.known("abcd").keys() == {"a", "c", "d"}
    assert cache.bytes == 3 * (2 * 4 + 1)


def test_bytes_are_bounded_and_a_row_is_counted_once():
    cache = RowCache(most_bytes=99)
    for _ in range(3):
        cache.keep({"a": torch.zeros(8), "é": torch.zeros(8)})
    assert cache.bytes == 2 * 32 + 1 + 2
    cache.keep({"c": torch.zeros(8)})
    assert cache.known("aéc").keys() == {"é", "c"}
    cache.keep({"huge": torch.zeros(100)})
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_row_keeps_no_batch_in_memory():
    cache = RowCache()
    cache.keep({"a": torch.zeros(1000, 8)[3]})
    assert cache.known("a")["a"].untyped_storage().nbytes() == 32


def test_many_threads():
    cache = RowCache(most_rows=50)

    def use(number: int) -> None:
        for i in range(300):
            text = str((number * i) % 80)
            cache.keep({text: torch.full((1,), float(text))})
            for name, row in cache.known([text, str(i % 80)]).items():
                assert float(row) == float(name)

    threads = [threading.Thread(target=use, args=(number,)) for number in (1, 3, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache) <= 50
    assert cache.bytes == sum(4 + len(text) for text in cache._rows)


def test_known_labels_cost_their_text_alone_and_answer_the_same(tmp_path: Path):
    encoder = tiny.encoder("bert", tmp_path)
    made = Pipeline(encoder, [tiny.delta(encoder, name, [Lora(rank=2)], SPEC, seed) for seed, name in enumerate("xy")])
    asked = {"text": "the film was great", "labels": ["good film", "bad_film", "bad film", "Paris"]}
    first = made.prepare(Request("x", asked, logits=True))
    assert first.unknown == ["good film", "bad film", "Paris"]
    assert len(first.encodings) == 4
    fresh = made.run([first])[0]
    second = made.prepare(Request("x", asked, logits=True))
    assert (second.unknown, len(second.encodings), second.cost) == ([], 1, 6)
    assert torch.allclose(*(torch.tensor(one.answer["logits"]) for one in (fresh, made.run([second])[0])), atol=1e-5)
    assert fresh.answer["scores"]["bad_film"] == fresh.answer["scores"]["bad film"]
    mixed = made.prepare(Request("x", {**asked, "labels": ["Paris", "London"]}))
    assert mixed.unknown == ["London"]
    assert made.prepare(Request("y", asked)).unknown == first.unknown, "every version has rows of its own"
    made.add(tiny.delta(encoder, "x", [Lora(rank=2)], SPEC, 9))
    assert made.prepare(Request("x", asked)).unknown == first.unknown


def test_windows_and_cut_texts_are_those_of_the_text(tmp_path: Path):
    encoder = tiny.encoder("bert", tmp_path)
    long = TaskSpec("zero-shot", (), 8, "mean", "none", long="windows", stride=2)
    short = TaskSpec("zero-shot", (), 8, "mean", "none")
    made = Pipeline(encoder, [tiny.delta(encoder, "long", [], long), tiny.delta(encoder, "short", [], short)])
    asked = {"text": "the film was not very good , the river was cold", "labels": ["film", "a cold river"]}
    for _ in range(2):  # whether or not the labels are known
        windows, cut = made.answer([Request("long", asked), Request("short", asked)])
        assert (windows.windows, windows.truncated) == (3, False)
        assert (cut.windows, cut.tokens_read, cut.tokens_given) == (1, 8, 13)
    alone = Pipeline(encoder, [tiny.delta(encoder, "rows", [], TaskSpec("embedding", head="none", max_length=8,
                     pooling="mean", long="windows", stride=2))])  # fmt: skip
    rows = [torch.tensor(one.answer["embedding"]) for one in alone.answer(
        Request("rows", {"text": text}) for text in (asked["text"], *asked["labels"]))]  # fmt: skip
    expected = (20 * torch.stack(rows[1:]) @ rows[0]).softmax(0)
    assert torch.allclose(
        torch.tensor([windows.answer["scores"][name] for name in asked["labels"]]), expected, atol=1e-5
    )
