"""Messages name the nearest known word, and never thousands of them."""

from __future__ import annotations

from bertology_serve.errors import RateLimited, about, nearest


def test_the_nearest_and_all_known_words() -> None:
    assert nearest("lroa", ["lora", "bitfit"]) == "did you mean 'lora'? known: bitfit, lora"
    assert nearest("xyz", ["lora", "bitfit"]) == "known: bitfit, lora"


def test_many_words_are_counted() -> None:
    assert nearest("name-7x", [f"name-{i}" for i in range(2000)]).endswith("known: 2000 others")


def test_an_error_names_what_it_is_about_once() -> None:
    problem = about(RateLimited("no such slot", 3.0), "deltas/x")
    assert (str(problem), problem.retry_after) == ("deltas/x: no such slot", 3.0)
    assert str(about(problem, "deltas/x")) == "deltas/x: no such slot"
