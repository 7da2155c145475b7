"""Messages name the nearest known word, and never thousands of them."""

from __future__ import annotations

from bertology_serve.errors import nearest


def test_the_nearest_and_all_known_words() -> None:
    assert nearest("lroa", ["lora", "bitfit"]) == "did you mean 'lora'? known: bitfit, lora"
    assert nearest("xyz", ["lora", "bitfit"]) == "known: bitfit, lora"


def test_many_words_are_counted() -> None:
    assert nearest("name-7x", [f"name-{i}" for i in range(2000)]).endswith("known: 2000 others")
