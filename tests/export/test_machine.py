from __future__ import annotations

import sys
import types

from bertology_serve.export.installation import look


def install(directory, name, version, requires=()):
    """A distribution as pip would leave it."""
    folder = directory / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")


def test_distributions_are_found_where_they_lie(tmp_path):
    install(tmp_path / "a", "Bertology_Serve", "0.3", ["torch>=2.9", "onnxruntime>=1.23; extra == 'cpu'"])
    install(tmp_path / "a", "onnxruntime-gpu", "1.31.1")
    install(tmp_path / "a", "torch", "2.9")
    install(tmp_path / "b", "torch", "2.1")  # hidden by the first
    found = look([str(tmp_path / "a"), str(tmp_path / "b")])
    assert found.installed == {"bertology-serve": "0.3", "onnxruntime-gpu": "1.31.1", "torch": "2.9"}
    assert found.required == ("torch>=2.9", "onnxruntime>=1.23; extra == 'cpu'")


def test_nothing_installed(tmp_path):
    found = look([str(tmp_path)])
    assert found.installed == {}
    assert found.required is None


def test_the_provider_is_the_one_that_really_runs():
    found = look()
    assert found.installed["torch"].startswith("2.")
    assert found.provider in ("CPUExecutionProvider", "CUDAExecutionProvider")
    assert found.runtime_error is None


def test_half_a_module_is_said(monkeypatch):
    """What is left when one of two distributions with the same module is uninstalled."""
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    found = look()
    assert found.provider is None
    assert "has no attribute" in str(found.runtime_error)


def test_it_looks_on_where_a_library_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "bertology_serve.export.emitter.nodes", None)
    found = look()
    assert (found.torch_cuda, found.torch_sees) == (None, False)
    assert (found.provider, found.runtime_error) == (None, None)
