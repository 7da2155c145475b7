from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from bertology_serve.deltas.safe_io import Limits, build, parse_json, read_bytes, read_json, read_tensors, untrusted
from bertology_serve.errors import BaseMismatch, FormatError, LimitError, Overloaded, Unsupported
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.slots import Slot
from bertology_serve.tasks.spec import TaskSpec

GOOD = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, {"format": "pt"})


def header(table: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[1]", "holds a list; expected a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "is no JSON number"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"1" * 10_000, "not valid JSON"),
    ],
)
def test_json_is_strict(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        parse_json(data, "delta.json")
    assert len(str(caught.value)) < 400


def test_json_is_capped(tmp_path: Path) -> None:
    (tmp_path / "delta.json").write_text('{"a": "' + "x" * 100 + '"}')
    with pytest.raises(FormatError, match="has 109 bytes; at most 50 are read"):
        read_json(tmp_path / "delta.json", Limits(json_bytes=50), tmp_path)


def test_tensors_and_hash_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    tensors, digest, size = read_tensors(path, Limits(), tmp_path)
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3))
    assert tensors["b"].dtype == torch.bfloat16
    assert (len(digest), size) == (64, len(GOOD))


@pytest.mark.parametrize("length", [0, 7, 8, 20, len(GOOD) - 1])
def test_a_truncated_file_says_so(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD[:length])
    with pytest.raises(FormatError, match="truncated"):
        read_tensors(path, Limits(), tmp_path)


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((2**62).to_bytes(8, "little") + b"{}", "claims a header of"),
        (header({"a": F32 | {"dtype": "I64", "data_offsets": [0, 8]}}, bytes(8)), "dtype 'I64'; expected one"),
        (header({"a": F32 | {"dtype": "BOOL"}}, bytes(4)), "dtype 'BOOL'"),
        (header({"a": 3}), "dtype None"),
        (header({"a": F32, "b": F32}, bytes(4)), "no valid safetensors"),
        (header({"a": F32 | {"shape": [2]}}, bytes(4)), "no valid safetensors"),
        (header({"a": F32 | {"shape": [-1]}}, bytes(4)), "no valid safetensors"),
        (header({"a": F32 | {"shape": [2**62, 2**62]}}, bytes(4)), "no valid safetensors"),
        (header({"a": F32 | {"data_offsets": [4, 8]}}, bytes(8)), "no valid safetensors"),
        (header({"a": F32}, bytes(8)), "no valid safetensors"),
        (header({"a": F32 | {"data_offsets": [0, 2**63]}}, bytes(4)), "truncated"),
        (header({"a": F32}, b"\0\0\xc0\x7f"), "holds NaN or infinity"),
        (header({"a": F32}, b"\0\0\x80\xff"), "holds NaN or infinity"),
        (header({f"t{i}": F32 for i in range(9)}, bytes(4)), "holds 9 tensors; at most 8"),
        (header([F32]), "expected a JSON object"),
        (header({"a": F32 | {"shape": [1] * 65}}, bytes(4)), "no valid safetensors"),
        (header({"a": F32 | {"shape": [0] * 70, "data_offsets": [0, 0]}}), "no valid safetensors"),
        (pickle.dumps({"a": 1}), "truncated|claims a header"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        read_tensors(path, Limits(tensors=8), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("a\nb"), KeyError("x"), MemoryError(), RecursionError(), OSError(5, "torn")]
)
def test_whatever_a_directory_raises_is_an_error_of_this_package_and_names_it(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(FormatError, match="here") as caught, untrusted(tmp_path / "here"):
        raise error
    assert "\n" not in str(caught.value)


def test_errors_of_this_package_keep_their_kind_and_gain_the_directory(tmp_path: Path) -> None:
    for error in (Unsupported("no"), LimitError("too long"), BaseMismatch("another")):
        with pytest.raises(type(error), match=f"{tmp_path}: {error}"), untrusted(tmp_path):
            raise error
    with pytest.raises(Overloaded) as caught, untrusted(tmp_path):
        raise Overloaded("full", 7.0)
    assert caught.value.retry_after == 7.0
    with pytest.raises(FormatError) as named, untrusted(tmp_path):
        raise FormatError(f"{tmp_path / 'x'} is torn")
    assert str(named.value) == f"{tmp_path / 'x'} is torn"


def test_the_file_size_is_capped(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    with pytest.raises(FormatError, match="at most 100 are read"):
        read_tensors(path, Limits(file_bytes=100), tmp_path)


def test_the_header_is_capped(tmp_path: Path) -> None:
    save_file({"a" * 500: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="at most 100 are read"):
        read_tensors(tmp_path / "x.safetensors", Limits(header_bytes=100), tmp_path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(GOOD)))
def test_any_change_is_read_or_refused(tmp_path: Path, changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(GOOD[: max(length, len(GOOD) - 20) if changes else length])
    for at, value in changes:
        if at < len(data):
            data[at] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    try:
        tensors, _, size = read_tensors(path, Limits(), tmp_path)
    except FormatError:
        return
    assert size == len(data)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_files_must_be_regular_and_inside(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.write_text("secret")
    (inside / "link").symlink_to(outside)
    (inside / "loop").symlink_to(inside / "loop")
    os.mkfifo(inside / "pipe")
    for name, message in {
        "link": "points outside",
        "loop": "cannot read",
        "pipe": "no regular file",
        ".": "no regular file",
        "../out": "points outside",
        "missing": "No such file",
        "nul\0": "cannot read",
    }.items():
        with pytest.raises(FormatError, match=message):
            read_bytes(inside / name, 100, inside)


def test_links_that_stay_inside_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("text")
    (tmp_path / "link").symlink_to("real")
    assert read_bytes(tmp_path / "link", 10, tmp_path) == b"text"


def test_lists_become_tuples_and_whole_numbers_floats() -> None:
    spec = build(Lora, {"targets": ["query"], "alpha": 16, "layers": [0, 2]}, "kinds.lora")
    assert spec == Lora(("query",), alpha=16.0, layers=(0, 2))
    assert isinstance(spec.alpha, float)


def test_null_stands_where_it_is_allowed() -> None:
    assert build(Adapter, {"activation": None}, "kinds.adapter") == Adapter()
    assert build(Lora, {"layers": None}, "kinds.lora").layers is None


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (Lora, {"rnak": 8}, "unknown field 'rnak'; did you mean 'rank'"),
        (Lora, {"rank": "8"}, "x.rank is '8'; expected a whole number"),
        (Lora, {"rank": 8.5}, "x.rank is 8.5; expected a whole number"),
        (Lora, {"rank": True}, "x.rank is True; expected a whole number"),
        (Lora, {"rank": 2**60}, "expected a whole number"),
        (Lora, {"alpha": 10**400}, "expected a number"),
        (Lora, {"alpha": float("nan")}, "expected a number"),
        (Lora, {"rank": None}, "x.rank is None"),
        (Lora, {"rank": -1}, "rank is -1"),
        (Lora, {"targets": "query"}, "x.targets is 'query'; expected a list"),
        (Lora, {"targets": ["query", 3]}, r"x.targets\[1\] is 3; expected a string"),
        (Lora, {"rslora": 1}, "x.rslora is 1; expected true or false"),
        (Lora, [], r"x is \[\]; expected an object"),
        (TaskSpec, {}, "lacks the field 'kind'"),
        (TaskSpec, {"kind": "chess"}, "unknown task 'chess'"),
        (Slot, {"name": "q", "paths": [], "inputs": 1, "outputs": 1, "has_bias": True, "part": [1]}, "has 1 entries"),
    ],
)
def test_what_does_not_fit_is_named(cls: type[Any], values: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        build(cls, values, "x")
