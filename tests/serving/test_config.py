from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from bertology_serve.errors import SpecError
from bertology_serve.serving.config import ServerConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_items": 0}, "max_items is 0; expected at least 1"),
        ({"port": 70_000}, "port is 70000"),
        ({"drain_seconds": -1}, "expected numbers from 0"),
        ({"max_queue_tokens": 100, "max_item_tokens": 200}, "max_queue_tokens .* could never wait"),
        ({"max_delta_tokens": 100}, "max_delta_tokens .* could never wait"),
        ({"max_call_seconds": float("inf")}, "max_call_seconds is inf"),
        ({"max_batch_ms": float("nan")}, "max_batch_ms is nan"),
        ({"weights": ("mood",)}, "weight 'mood'; expected NAME=WEIGHT"),
        ({"weights": ("mood=0",)}, "weight 'mood=0'"),
        ({"weights": ("=2",)}, "weight '=2'"),
        ({"weights": ("mood=nan",)}, "weight 'mood=nan'"),
        ({"gzip_bytes": -1}, "gzip_bytes is -1"),
        ({"cors_origin": ("app.example",)}, "cors_origin 'app.example'; expected https://HOST"),
        ({"cors_origin": ("https://app.example/",)}, "without a path"),
        ({"cors_origin": ("https://*.example",)}, "without a path"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(SpecError, match=message):
        ServerConfig.of(**options)


def test_weights():
    assert ServerConfig.of(weights=("mood=2", "grade=0.5")).batching.weight_of() == {"mood": 2.0, "grade": 0.5}


def test_origins():
    ServerConfig.of(cors_origin=("https://app.example", "http://localhost:5173", "http://[::1]:80", "*"))


def test_every_option_has_a_help_text():
    for concern in fields(ServerConfig):
        assert all(
            option.metadata["help"].endswith((".", "them.")) for option in fields(getattr(ServerConfig(), concern.name))
        )


def test_options_by_name():
    config = ServerConfig.of(port=0, max_items=7)
    assert (config.listen.port, config.limits.max_items) == (0, 7)
    assert ServerConfig.of() == ServerConfig()
    with pytest.raises(SpecError, match="has no option 'max_item'; did you mean 'max_items'"):
        ServerConfig.of(max_item=7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_items": "x"}, "max_items is 'x'; expected"),
        ({"max_items": None}, "max_items is None; expected"),
        ({"max_items": 2.5}, "max_items is 2.5; expected"),
        ({"max_items": True}, "max_items is True; expected"),
        ({"max_batch_ms": "nan"}, "max_batch_ms is 'nan'; expected"),
        ({"log_calls": "yes"}, "log_calls is 'yes'; expected"),
        ({"log_level": "loud"}, "log_level is 'loud'; "),
        ({"cors_origin": "https://a"}, "cors_origin is 'https://a'; expected a list"),
    ],
)
def test_options_of_another_type_are_refused(options, said):
    with pytest.raises(SpecError, match=said):
        ServerConfig.of(**options)


def test_options_become_what_they_are_to_be():
    made = ServerConfig.of(max_batch_ms=20, cors_origin=["https://a"], keys_file="keys.json", device_mb=None)
    assert (made.batching.max_batch_ms, made.listen.cors_origin) == (20.0, ("https://a",))
    assert made.listen.keys_file == Path("keys.json")
