from __future__ import annotations

import ast
import sys
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch

import bertology_serve
from bertology_serve.errors import Unsupported, VerificationError
from bertology_serve.export import session
from bertology_serve.export.emitter.nodes import Nodes, Output
from bertology_serve.export.session import DIGESTS, GRAPH, WEIGHTS, Session, answer, drop_kept, kept_session, sources


def test_without_onnx_runtime_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Unsupported, match=r"pip install 'bertology-serve\[cpu\]', or 'bertology-serve\[gpu\]'"):
        Session(tmp_path / "model.onnx")


def test_a_file_that_cannot_be_loaded_is_a_failed_verification(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(VerificationError, match=r"^ONNX Runtime \S+ cannot load the file: [^\n]+$"):
        Session(tmp_path / "model.onnx")


def test_the_answer_of_files_new_and_old():
    """Files of earlier versions have one output: ``logits``, of answers in texts [B, L, 2], or ``embedding``."""
    start, end, rows, pooled = np.zeros((2, 5)), np.ones((2, 5)), np.ones((2, 5, 3)), np.ones((2, 3))
    both = answer({"start_logits": start, "end_logits": end})
    assert both.shape == (2, 5, 2)
    assert np.array_equal(both, answer({"logits": np.stack([start, end], -1)}))
    assert answer({"last_hidden_state": rows, "sentence_embedding": pooled}) is pooled
    assert answer({"embedding": pooled}) is pooled


X = {"x": np.linspace(-1, 1, 48, dtype=np.float32).reshape(2, 24)}


class Maker:
    """Writes a small graph; ``count`` is how often it was asked to."""

    def __init__(self, slope: float = 1.0) -> None:
        self.count, self.slope = 0, slope

    def __call__(self, path: Path) -> None:
        self.count += 1
        nodes = Nodes(20)
        x = nodes.input("x", ("rows", 24), onnx_ir.DataType.FLOAT)
        w = nodes.weight("w", torch.linspace(-self.slope, self.slope, 24 * 24).reshape(24, 24))
        onnx_ir.save(nodes.model([x], Output("y", nodes("MatMul", x, w), ("rows", 24))), path, external_data=WEIGHTS)


@pytest.fixture
def graphs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BERTOLOGY_CACHE", str(tmp_path))
    return tmp_path / "graphs"


def test_a_graph_is_made_once_and_gives_the_same_bits_from_the_disk(graphs):
    make = Maker()
    first, second = kept_session({"a": 1}, make), kept_session({"a": 1}, make)
    assert make.count == 1
    assert np.array_equal(first.run(X), second.run(X))
    assert {file.name for file in next(graphs.iterdir()).iterdir()} == {GRAPH, WEIGHTS, DIGESTS}
    assert graphs.stat().st_mode & 0o777 == 0o700
    assert not np.array_equal(kept_session({"a": 2}, Maker(2.0)).run(X), first.run(X))
    drop_kept()
    kept_session({"a": 1}, make)
    assert make.count == 2


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS, DIGESTS])
@pytest.mark.parametrize("harm", ["cut", "changed", "gone"])
def test_a_damaged_one_is_made_anew(name, harm, graphs):
    make = Maker()
    expected = kept_session({}, make).run(X)
    file = next(graphs.iterdir()) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if harm == "changed" else content[:-1])
    if harm == "gone":
        file.unlink()
    for count in (2, 2):
        assert np.array_equal(kept_session({}, make).run(X), expected)
        assert make.count == count


def test_of_other_parts_versions_or_sources_it_is_another(graphs, monkeypatch, tmp_path):
    make, here = Maker(), session.environment()
    kept_session({"precision": "fp32"}, make)
    kept_session({"precision": "int8-row"}, make)
    assert make.count == 2
    for other in ({"cpu": "another"}, {"versions": here["versions"] | {"onnxruntime": "0.1"}}):
        with monkeypatch.context() as patched:
            patched.setattr(session, "environment", lambda other=other: here | other)
            kept_session({"precision": "fp32"}, make)
    assert make.count == 4
    with monkeypatch.context() as patched:
        (tmp_path / "cpuinfo").write_text("model name\t: AMD EPYC\nflags\t\t: fpu sse2\n")
        patched.setattr(session, "CPUINFO", tmp_path / "cpuinfo")
        kept_session({"precision": "fp32"}, make)
    assert make.count == 5
    (tmp_path / "new.py").write_text("x = 1")
    monkeypatch.setattr(session, "sources", lambda: iter([*sources(), tmp_path / "new.py"]))
    kept_session({"precision": "fp32"}, make)
    assert make.count == 6


def test_another_users_is_not_read(graphs, monkeypatch):
    make = Maker()
    kept_session({}, make)
    monkeypatch.setattr("bertology_serve.files.os.geteuid", lambda: graphs.stat().st_uid + 1)
    kept_session({}, make)
    assert make.count == 2


def test_where_nothing_can_be_kept_it_runs_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    make = Maker()
    for place in ("", str(tmp_path / "file")):
        monkeypatch.setenv("BERTOLOGY_CACHE", place)
        kept_session({}, make).run(X)
    assert make.count == 2
    monkeypatch.setenv("BERTOLOGY_CACHE", str(tmp_path))
    monkeypatch.setattr(session, "_digests", _no_space)
    kept_session({}, make).run(X)
    assert list((tmp_path / "graphs").iterdir()) == []


def _no_space(place: Path) -> None:
    raise OSError(28, "No space left on device")


def test_those_not_used_for_longest_leave_first(graphs, monkeypatch):
    make = Maker()
    kept_session({"a": 1}, make)
    size = sum(file.stat().st_size for file in next(graphs.iterdir()).iterdir())
    monkeypatch.setattr(session, "MOST_KEPT", int(2.5 * size))
    kept_session({"a": 2}, make)
    kept_session({"a": 1}, make)  # used again
    kept_session({"a": 3}, make)
    assert make.count == 3
    kept_session({"a": 1}, make)
    assert make.count == 3
    kept_session({"a": 2}, make)
    assert make.count == 4


def test_what_a_graph_follows_from_is_among_its_sources():
    """All modules that the emitter imports, and what these import: a graph made by others is not taken."""
    root = Path(bertology_serve.__file__).parent
    known = {path.relative_to(root).with_suffix("").as_posix().replace("/", ".") for path in sources()}
    seen, ahead = set(), ["export.emitter.emit", "export.onnx_engine"]
    while ahead:
        name = ahead.pop()
        if name in seen or not (file := root / f"{name.replace('.', '/')}.py").is_file():
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bertology_serve."):
                module = str(node.module).removeprefix("bertology_serve.")
                ahead += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    assert len(seen) > 30
    assert sorted(name for name in seen - known if not name.startswith("kernels.")) == []
