from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from bertology_serve.export.export_spec import CUDA
from bertology_serve.export.installation import Machine, findings, look


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


CPU = "CPUExecutionProvider"
REQUIRED = ("torch>=2.9", "onnxruntime>=1.23; extra == 'cpu'", "bertology-serve[cpu]; extra == 'dev'",
            "triton>=3.5; sys_platform == 'never'")  # fmt: skip
HEALTHY: dict[str, Any] = {
    "installed": {"bertology-serve": "0.3", "torch": "2.13.0", "onnxruntime": "1.32.0", "triton": "3.9"},
    "required": REQUIRED,
    "provider": CPU,
}
GPU = {"gpu": True, "torch_cuda": "13.0", "torch_sees": True}


def found(installed: dict[str, str | None] | None = None, **facts: Any) -> dict[str, tuple[str, str]]:
    """Subject -> (state, its line) of a healthy machine with some facts changed; ``None`` uninstalls."""
    have = {name: one for name, one in (HEALTHY["installed"] | (installed or {})).items() if one is not None}
    lines = findings(Machine(**HEALTHY | facts | {"installed": have}))
    return {one.what: (one.state, one.line()) for one in lines}


def test_a_healthy_machine():
    assert {state for state, _ in found().values()} == {"ok"}
    gpu = found({"onnxruntime": None, "onnxruntime-gpu": "1.31.1"}, **GPU, provider=CUDA)
    assert {state for state, _ in gpu.values()} == {"ok"}
    assert gpu["CUDA in onnxruntime"][1] == "ok      CUDA in onnxruntime: used when asked for"


def test_a_processor_that_multiplies_faster_in_bfloat16():
    assert found(bf16_pays=True)["bfloat16"][0] == "ok"
    assert "bfloat16" not in found()
    assert "bfloat16" not in found(bf16_pays=True, gpu=True)


def test_both_onnx_runtimes_at_once():
    for facts, extra in (({}, "cpu"), (GPU, "gpu")):
        state, line = found({"onnxruntime-gpu": "1.31.1"}, **facts)["onnxruntime"]
        assert state == "broken"
        assert line == (
            "broken  onnxruntime: onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 share one module; the one installed "
            "last hides the other; pip uninstall -y onnxruntime onnxruntime-gpu && "
            f"pip install 'bertology-serve[{extra}]'"
        )


@pytest.mark.parametrize(
    ("installed", "facts", "what", "state", "said"),
    [
        ({"onnxruntime": None}, {"provider": None}, "onnxruntime", "note", "pip install 'bertology-serve[cpu]'"),
        ({"onnxruntime": None}, {"provider": None, **GPU}, "onnxruntime", "note", "pip install 'bertology-serve[gpu]'"),
        ({}, {"provider": None, "runtime_error": "no InferenceSession"}, "onnxruntime", "broken", "no InferenceSess"),
        ({"onnxruntime": None, "onnxruntime-gpu": "1.31"}, {}, "CUDA in onnxruntime", "note", "no NVIDIA GPU here"),
        ({"onnxruntime": None, "onnxruntime-gpu": "1.31"}, GPU, "CUDA in onnxruntime", "broken", "[cuda,cudnn]"),
        ({}, GPU, "CUDA in onnxruntime", "note", "the CPU build is installed beside an NVIDIA GPU"),
        ({"onnxruntime": "1.20"}, {}, "onnxruntime", "broken", "1.20 is installed, >=1.23 is needed; pip install"),
        ({"torch": "2.8"}, {}, "torch", "broken", "2.8 is installed, >=2.9 is needed; pip install 'torch>=2.9'"),
        ({"torch": None}, {}, "torch", "broken", "nothing is installed, >=2.9 is needed"),
        ({}, {"gpu": True}, "torch", "broken", "was built without CUDA"),
        ({}, {"gpu": True, "torch_cuda": "13.0"}, "torch", "broken", "update the NVIDIA driver"),
        ({"triton": None}, GPU, "triton", "broken", "pip install triton"),
        ({"triton": None}, {}, "triton", "note", "not installed"),
        ({}, {"required": None}, "bertology-serve", "note", "versions were not checked; pip install -e ."),
    ],
)
def test_what_is_wrong_and_how_to_mend_it(installed, facts, what, state, said):
    lines = findings(Machine(**HEALTHY | facts | {"installed": _with(installed)}))
    matching = [one for one in lines if one.what == what and one.state == state]
    assert len(matching) == 1
    assert said in matching[0].line()
    assert "\n" not in matching[0].line()


def _with(changes: dict[str, str | None]) -> dict[str, str]:
    return {name: one for name, one in (HEALTHY["installed"] | changes).items() if one is not None}
