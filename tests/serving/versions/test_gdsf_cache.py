from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bertology_serve.serving.versions.gdsf_cache import GdsfCache, Kept


def filled(*names: str, capacity: float = 100, size: int = 10, cost: float = 1.0) -> GdsfCache:
    made = GdsfCache(capacity)
    for name in names:
        made.put(name, size, cost)
    return made


def test_of_equal_size_and_cost_the_least_used_goes():
    made = filled("a", "b", "c")
    for name in ("a", "b", "b", "c", "c"):
        made.touch(name)
    assert made.victim() == "a"
    assert made.victim(lambda name: name == "a") == "b"
    assert made.victim(lambda name: True) is None


def test_what_is_large_goes_before_what_is_dear():
    made = GdsfCache(100)
    made.put("large", 50, 1.0)
    made.put("dear", 10, 5.0)
    made.put("cheap", 10, 1.0)
    order = []
    while len(made):
        order.append(made.victim())
        made.evict(order[-1])
    assert order == ["large", "cheap", "dear"]


def test_nothing_stays_for_ever_for_having_been_popular():
    made = filled("old", capacity=20)
    for _ in range(50):
        made.touch("old")
    for number in range(200):
        if made.too_much(10):
            victim = made.victim()
            made.evict(victim)
        made.put(f"new{number}", 10, 1.0)
        if "old" not in made:
            break
    assert "old" not in made


def test_what_is_dropped_while_it_is_touched_is_no_error(monkeypatch):
    """A batch's thread notes a use at the moment at which a loader's evicts."""
    made = filled("a", "b")

    class Dropped(Kept):
        def __setattr__(self, field: str, value: object) -> None:
            if field == "uses" and value == 1:
                made.evict("a")
            super().__setattr__(field, value)

    made._entries["a"] = Dropped(10, 1.0)
    made.touch("a")
    assert (set(made), made.used) == ({"b"}, 10)
    made.touch("a")
    assert made.victim() == "b"


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 40), st.floats(0.001, 9))), st.integers(40, 100))
def test_the_capacity_is_kept_and_the_count_is_right(steps, capacity):
    made = GdsfCache(capacity)
    sizes: dict[str, int] = {}
    for name, size, cost in steps:
        made.evict(name)
        sizes.pop(name, None)
        while made.too_much(size):
            victim = made.victim()
            made.evict(victim)
            del sizes[victim]
        made.put(name, size, cost)
        sizes[name] = size
        assert made.used == sum(sizes.values()) <= capacity
        assert set(made) == sizes.keys()
