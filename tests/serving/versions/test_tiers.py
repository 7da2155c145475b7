"""Deltas between disk, host and device: capacity, single flight, pins, leases, failures, swaps."""

from __future__ import annotations

import gc
import random
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bertology_serve.deltas import store
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import FormatError, LimitError, NotFound, Overloaded, Unsupported
from bertology_serve.kinds.lora import Lora
from bertology_serve.serving.versions.cards import read_card
from bertology_serve.serving.versions.delta_cache import Tier
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.serving.versions.desired import Split
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny

COUNT = 8
TASK = TaskSpec("classification", ("bad", "good"), 32)


@pytest.fixture(scope="module")
def many(encoder, tmp_path_factory) -> Path:
    """Eight deltas of equal size, d0 in two versions."""
    root: Path = tmp_path_factory.mktemp("many")
    for number in range(COUNT):
        delta = tiny.delta(encoder, f"d{number}", [Lora(rank=2)], TASK, number)
        store.save(delta, root / delta.name / "1", encoder.anatomy, encoder.config.to_dict())
    second = tiny.delta(encoder, "d0", [Lora(rank=2)], TASK, 99)
    store.save(second, root / "d0" / "2", encoder.anatomy, encoder.config.to_dict())
    return root


@pytest.fixture
def size(encoder, many) -> int:
    return store.load(many / "d1" / "1", encoder.anatomy).bytes


@pytest.fixture
def made(encoder, many, size) -> Callable[..., Registry]:
    """A registry whose device holds three deltas, and its host one."""

    def make(fits: int = 3, host: int = 1) -> Registry:
        registry = Registry(Pipeline(encoder), device_bytes=fits * size + size // 2, host_bytes=host * size)
        registry.tiers._clock = lambda: 0.0  # all cost the same
        assert registry.load(many) == []
        return registry

    return make


def label(registry: Registry, name: str) -> Any:
    pipeline = registry.pipeline
    return pipeline.run([pipeline.prepare(Request(name, {"text": "the cat was good"}))])[0].answer["scores"]


def test_all_are_known_and_as_many_are_resident_as_fit(made):
    registry = made()
    assert [delta.name for delta in registry.all()] == ["base", *(f"d{n}" for n in range(COUNT))]
    assert registry.tiers.counts() == {Tier.DEVICE: 3, Tier.DISK: COUNT - 3, Tier.HOST: 0, Tier.LOADING: 0}
    cold = registry.find("d7")
    assert (cold.task, cold.version, cold.kinds, cold.tensors) == (TASK, "1", ("lora",), {})
    assert cold.bytes > 0
    assert registry.find("d0").version == "2"


def test_a_delta_comes_up_and_another_goes_down_to_the_host_and_then_to_disk(made, encoder, many):
    registry = made()
    tiers = registry.tiers
    assert tiers.is_cold("d5")
    tiers.touch(["d1", "d2"])
    tiers.raise_up("d5")
    assert (tiers.tier("d5"), tiers.tier("d0"), tiers.tier("d1")) == (Tier.DEVICE, Tier.HOST, Tier.DEVICE)
    loads = tiers.loads
    tiers.touch(["d5", "d5", "d1", "d1"])
    tiers.raise_up("d0")  # from the host: nothing is read
    assert tiers.loads == loads
    assert tiers.tier("d2") is Tier.HOST
    tiers.raise_up("d6")
    assert sum(tier is Tier.HOST for tier in map(tiers.tier, tiers.cards)) == 1
    assert tiers.evictions == 3
    alone = Pipeline(encoder)
    alone.add(store.load(many / "d6" / "1", encoder.anatomy))
    answer = alone.run([alone.prepare(Request("d6", {"text": "the cat was good"}))])[0].answer["scores"]
    assert label(registry, "d6") == pytest.approx(answer, abs=1e-5)


def test_the_device_never_holds_more_than_its_bytes_and_the_pools_do_not_grow(made, size):
    registry = made()
    for _ in range(3):
        for number in range(COUNT):
            registry.tiers.raise_up(f"d{number}")
            assert registry.tiers.device_bytes <= 3 * size + size // 2
            assert len(registry.pipeline.deltas) <= 4
    first = registry.pipeline.bank.bytes
    for number in range(COUNT):
        registry.tiers.raise_up(f"d{number}")
    assert registry.pipeline.bank.bytes == first


def test_pins_and_leases_stay(made):
    registry = made()
    tiers = registry.tiers
    tiers.pin("d0")
    with tiers.lease(["d1"]):
        tiers.raise_up("d5")
        tiers.raise_up("d6")
        assert {"d0", "d1"} <= registry.pipeline.deltas.keys()
        tiers.pin("d6")
        with pytest.raises(Overloaded, match="pinned or in use"):
            tiers.raise_up("d7")
    tiers.raise_up("d7")
    assert tiers.tier("d1") is not Tier.DEVICE
    tiers.pin("d0", False)
    tiers.raise_up("d1")
    assert tiers.tier("d0") is not Tier.DEVICE


def test_many_at_once_read_a_delta_once(made, monkeypatch):
    registry = made()
    reads: list[str] = []
    read = registry._read
    monkeypatch.setattr(registry, "_read", lambda *args: reads.append(args[1]) or time.sleep(0.02) or read(*args))
    threads = [threading.Thread(target=registry.tiers.raise_up, args=("d5",)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert reads == ["d5"]


def test_what_cannot_be_loaded_is_remembered_for_a_while_and_tried_again(made, monkeypatch):
    registry, now = made(), [0.0]
    monkeypatch.setattr(registry.tiers, "_clock", lambda: now[0])
    tries: list[str] = []

    def torn(path: Path, name: str) -> Any:
        tries.append(name)
        raise FormatError("torn")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "_read", torn)
        for _ in range(3):
            with pytest.raises(FormatError, match="torn"):
                registry.tiers.raise_up("d5")
        assert tries == ["d5"]
        now[0] = 6.0
        with pytest.raises(FormatError):
            registry.tiers.raise_up("d5")
        assert tries == ["d5", "d5"]
    registry.tiers.register(registry.tiers.cards["d5"])
    assert registry.tiers.raise_up("d5").name == "d5"
    assert registry.tiers.failures == 2


def test_versions_swap_wherever_the_delta_is(made):
    registry = made()
    before = label(registry, "d0")
    registry.put("d0", "1")
    assert registry.pipeline.resident("d0").version == "1"
    assert label(registry, "d0") != pytest.approx(before, abs=1e-3)
    for name in ("d5", "d6", "d7"):
        registry.tiers.touch([name])
        registry.tiers.raise_up(name)
    assert registry.tiers.is_cold("d0")
    assert registry.put("d0", "2").version == "2"
    assert label(registry, "d0") == pytest.approx(before, abs=1e-5)


def test_what_was_removed_is_nowhere(made):
    registry = made()
    tiers = registry.tiers
    for name in ("d0", "d7"):
        registry.remove(name)
        assert name not in [delta.name for delta in registry.all()]
        with pytest.raises(NotFound):
            tiers.tier(name)
        with pytest.raises(NotFound):
            tiers.raise_up(name)
        with pytest.raises(NotFound):
            registry.remove(name)
    with pytest.raises(Unsupported):
        registry.remove("base")


def test_coming_back_too_soon_is_noticed(made, caplog):
    registry = made(fits=1, host=0)
    for turn in range(6):
        for name in ("d0", "d1"):
            registry.tiers.raise_up(name)
        if turn == 2:
            assert caplog.text == ""
    assert registry.tiers.thrashed >= 8
    assert "the device holds too few" in caplog.text


def test_a_directory_of_peft_s_has_no_card(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert read_card(tmp_path, "x", tmp_path) is None


def test_a_delta_for_another_encoder_is_refused_before_it_is_read(encoder, many, tmp_path):
    other = tiny.encoder("bert", tmp_path / "other", seed=5)
    registry = Registry(Pipeline(other), device_bytes=10**6)
    refused = registry.load(many, skip_bad=True)
    assert len(refused) == COUNT
    assert all("made for" in refusal.reason for refusal in refused)


def test_what_is_larger_than_the_device_is_told_so(made):
    registry = made(fits=0)
    with pytest.raises(LimitError, match="the device takes"):
        registry.tiers.raise_up("d0")


def failing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no rows are copied."""

    def runs_out(key: str, delta: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(registry.pipeline, "admit", runs_out)


def test_a_swap_that_fails_leaves_the_old_version_counted(made, size, monkeypatch):
    registry = made(fits=1, host=0)
    assert registry.tiers.device_bytes == size
    with monkeypatch.context() as patch:
        failing(registry, patch)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="out of memory"):
                registry.put("d0", "1")
    assert registry.tiers.device_bytes == size
    assert registry.pipeline.resident("d0").version == "2"
    registry.tiers.raise_up("d1")  # so that one of the two has to go
    assert registry.tiers.is_cold("d0")
    assert registry.tiers.device_bytes == size


def test_what_stands_beside_takes_room_too(made, size, many):
    registry = made(fits=2, host=0)
    tiers, label_before = registry.tiers, label(registry, "d0")
    registry.split("d0", Split("1", 0.5))
    assert tiers.device_bytes == 2 * size
    assert registry.resident() == ["d0"]
    tiers.pin("d0")
    with pytest.raises(Overloaded, match="pinned or in use"):
        tiers.raise_up("d1")
    with pytest.raises(Overloaded):
        registry.split("d1", Split("1"))
    registry.put("d0", "1")
    with pytest.raises(NotFound):
        registry.split("d0", Split("1", shadow="7"))
    assert registry.splits.of("d0") == Split("1", 0.5)
    registry.split("d0", Split())
    assert tiers.device_bytes == size
    assert registry.rollback("d0").version == "2"  # from disk: the host takes nothing
    assert label(registry, "d0") == pytest.approx(label_before, abs=1e-5)
    assert (tiers.device_bytes, tiers.host_bytes) == (size, 0)


def test_a_split_of_which_one_version_fails_brings_up_neither(made, size, many, tmp_path):
    registry = made(fits=3)
    shutil.copytree(many / "d0", tmp_path / "d0")
    shutil.copytree(tmp_path / "d0" / "1", tmp_path / "d0" / "3")
    (tmp_path / "d0" / "3" / "adapter_model.safetensors").write_bytes(b"torn")
    registry.root = tmp_path
    before = registry.tiers.device_bytes
    with pytest.raises(FormatError):
        registry.split("d0", Split("1", shadow="3"))
    assert registry.tiers.device_bytes <= before
    assert registry.pipeline._beside == {}
    assert not registry.splits


def test_the_version_before_is_kept_on_the_host_and_one_only(made, size):
    registry = made(fits=2, host=1)
    tiers = registry.tiers
    for version in ("1", "2", "1", "2"):
        registry.put("d0", version)
        assert tiers.host_bytes == size
    loads = tiers.loads
    registry.rollback("d0")
    assert (tiers.loads, tiers.host_bytes) == (loads, size)
    registry.remove("d0")
    assert tiers.host_bytes == 0


def test_a_version_with_calls_under_way_is_counted_until_they_are_answered(made, size):
    registry = made(fits=2, host=0)
    pipeline, tiers = registry.pipeline, registry.tiers
    jobs = [pipeline.prepare(Request("d0", {"text": "the cat"}))]
    registry.put("d0", "1")
    assert tiers.device_bytes == 3 * size  # d1, and d0 twice
    jobs.append(pipeline.prepare(Request("d0", {"text": "the cat"})))
    registry.put("d0", "2")
    assert tiers.is_cold("d1")  # which had to make room for what is not yet gone
    assert [answer.version for answer in pipeline.run(jobs)] == ["2", "1"]
    jobs.clear()
    assert tiers.device_bytes == size


def test_nothing_is_remembered_of_names_that_are_not_there(made):
    registry = made()
    tiers = registry.tiers
    for number in range(100):
        for do in (tiers.raise_up, registry.remove, registry.rollback, registry.put):
            with pytest.raises(NotFound):
                do(f"x{number}")
    for number in range(COUNT):
        registry.tiers.raise_up(f"d{number}")
    for number in range(COUNT):
        registry.remove(f"d{number}")
    maps = (tiers._locks, tiers._costs, tiers._failed, tiers._left, tiers._before, tiers._leases, tiers._deltas)
    assert [len(known) for known in maps] == [0] * len(maps)


def test_what_could_not_be_loaded_is_not_held_by_the_memory_of_it(made, monkeypatch):
    registry = made()
    gone: list[Any] = []

    def refuses(key: str, delta: Any) -> Any:
        gone.append(weakref.ref(delta))
        raise FormatError("no")

    monkeypatch.setattr(registry.pipeline, "admit", refuses)
    for _ in range(2):
        with pytest.raises(FormatError, match="no"):
            registry.tiers.raise_up("d5")
    gc.collect()
    assert [found() for found in gone] == [None]


def test_loaders_at_once_keep_within_the_device(made, size):
    """Four threads bring up deltas at random: nobody is promised room that another one takes."""
    registry = made(fits=3)
    tiers, most, draw = registry.tiers, [0], random.Random(0)
    orders = [[draw.randrange(COUNT) for _ in range(40)] for _ in range(4)]

    def load(order: list[int]) -> None:
        for number in order:
            with suppress(Overloaded):
                tiers.raise_up(f"d{number}")
            most.append(tiers.device_bytes)
            tiers.touch([f"d{number}"])

    threads = [threading.Thread(target=load, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert max(most) <= 3 * size + size // 2
    answering = [delta for delta in registry.pipeline.deltas.values() if delta.name != "base"]
    assert tiers.device_bytes == size * len(answering)
    assert set(tiers._device) == {delta.name for delta in answering}
