"""The machine and what is installed on it: beside measurements, and for ``doctor``, which says what to mend."""

from __future__ import annotations

import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import Requirement

from bertology_serve import __version__
from bertology_serve.errors import BertologyError
from bertology_serve.export.export_spec import CUDA

if TYPE_CHECKING:
    from bertology_serve.encoder.encoder import Encoder


OURSELVES = "bertology-serve"
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidia0"))


@dataclass(frozen=True)
class Machine:
    """``installed`` are versions by normalised distribution name; ``required`` what ours asks for, as metadata has it
    (``None`` where it is not installed as a distribution). ``gpu``: an NVIDIA driver is there.

    ``torch_cuda`` is the CUDA that torch was built for, ``torch_sees`` whether it can use it. ``provider`` is what ONNX
    Runtime runs on when CUDA is asked for, ``runtime_error`` why it runs nothing at all. ``bf16_pays``: the processor
    multiplies faster in bfloat16 than in float32 (a timing).
    """

    installed: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] | None = None
    gpu: bool = False
    torch_cuda: str | None = None
    torch_sees: bool = False
    provider: str | None = None
    runtime_error: str | None = None
    bf16_pays: bool = False


def look(path: Iterable[str] | None = None) -> Machine:
    """This machine; ``path`` are the directories where distributions are looked for, ``sys.path`` by default."""
    found = metadata.distributions() if path is None else metadata.distributions(path=list(path))
    distributions: dict[str, metadata.Distribution] = {}
    for one in found:  # the first on the path is the one that is imported
        distributions.setdefault(normalised(one.name), one)
    ours = distributions.get(OURSELVES)
    cuda, sees = _torch()
    provider, error = _runtime()
    return Machine(
        installed={name: one.version for name, one in sorted(distributions.items())},
        required=None if ours is None else tuple(ours.requires or ()),
        gpu=any(driver.exists() for driver in DRIVERS),
        torch_cuda=cuda,
        torch_sees=sees,
        provider=provider,
        runtime_error=error,
        bf16_pays=_bf16_pays(),
    )


def normalised(name: str) -> str:
    """A distribution's name as PEP 503 compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _torch() -> tuple[str | None, bool]:
    """The CUDA that torch was built for, and whether it can use it."""
    try:
        import torch
    except (ImportError, OSError):  # missing, or a library of its is
        return None, False
    return torch.version.cuda, torch.cuda.is_available()


def _bf16_pays() -> bool:
    try:
        import torch

        from bertology_serve.encoder.linear import pays
    except (ImportError, OSError):
        return False
    return pays(torch.bfloat16)


def _runtime() -> tuple[str | None, str | None]:
    """The provider that runs a small file when CUDA is asked for, or why none does."""
    try:
        from bertology_serve.export.emitter.nodes import Nodes, Output
        from bertology_serve.export.export_directory import save
        from bertology_serve.export.session import Session, silence
    except (ImportError, OSError):  # not ONNX Runtime's fault: what is missing is among the versions
        return None, None
    nodes = Nodes(opset=18)
    x = nodes.input("x")
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that CUDA is not there is what we want to know
        path = Path(directory) / "model.onnx"
        save(nodes.model([x], Output("y", x.real(), ("batch", "sequence"))), path)
        try:
            silence()
            return Session(path, CUDA).provider, None
        except (BertologyError, AttributeError) as error:  # half a module is left where one of two was uninstalled
            return None, str(error)


CPU_RUNTIME, GPU_RUNTIME = "onnxruntime", "onnxruntime-gpu"
RUNTIMES = (CPU_RUNTIME, GPU_RUNTIME, "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-rocm")
_CPU, _GPU = f"pip install '{OURSELVES}[cpu]'", f"pip install '{OURSELVES}[gpu]'"


@dataclass(frozen=True)
class Finding:
    """One line: ``state`` says whether it works, ``mend`` what to do, empty where nothing is to be done."""

    state: Literal["ok", "note", "broken"]
    what: str
    found: str
    mend: str = ""

    def line(self) -> str:
        """State, subject, finding and remedy."""
        return f"{self.state:6}  {self.what}: {self.found}" + (f"; {self.mend}" if self.mend else "")


def findings(machine: Machine) -> list[Finding]:
    """Everything that was looked at, in a fixed order."""
    return [
        *_versions(machine),
        *_checkup_runtime(machine),
        *_cuda(machine),
        *_checkup_torch(machine),
        *_triton(machine),
        *_bf16(machine),
    ]


def of_encoder(encoder: Encoder) -> Finding:
    """How an encoder's rows travel here; padded ones give the same answers, more slowly."""
    what, layers = f"encoder {encoder.name}", f"{encoder.anatomy.family}, {encoder.anatomy.layers} layers"
    if encoder.packs:
        return Finding("ok", what, f"{layers}, {encoder.packing}")
    mend = "the answers are the same, batches are slower; a newer transformers may pack them"
    return Finding("note", what, f"{layers}, {encoder.packing}", mend)


def _versions(machine: Machine) -> Iterator[Finding]:
    """Each requirement beside what is installed; what only extras ask for may be missing."""
    if machine.required is None:
        yield Finding("note", OURSELVES, "runs from a source tree: versions were not checked", "pip install -e .")
        return
    wrong = list(_wrong_versions(machine, machine.required))
    yield from wrong
    if not wrong:
        yield Finding("ok", OURSELVES, f"{machine.installed[OURSELVES]}, and every version it asks for")


def _wrong_versions(machine: Machine, required: tuple[str, ...]) -> Iterator[Finding]:
    for requirement in map(Requirement, required):
        name = normalised(requirement.name)
        optional, have = "extra" in str(requirement.marker or ""), machine.installed.get(name)
        applies = optional or requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not applies or name == OURSELVES or (have is None and optional):
            continue
        if have is None or not requirement.specifier.contains(have, prereleases=True):
            found = f"{have or 'nothing'} is installed, {requirement.specifier} is needed"
            yield Finding("broken", name, found, f"pip install '{name}{requirement.specifier}'")


def _checkup_runtime(machine: Machine) -> Iterator[Finding]:
    there = [name for name in RUNTIMES if name in machine.installed]
    shown = " and ".join(f"{name} {machine.installed[name]}" for name in there)
    if len(there) > 1:
        again = _GPU if machine.gpu else _CPU
        mend = f"pip uninstall -y {' '.join(there)} && {again}"
        yield Finding(
            "broken", "onnxruntime", f"{shown} share one module; the one installed last hides the other", mend
        )
    elif not there:
        extra = _GPU if machine.gpu else _CPU
        yield Finding("note", "onnxruntime", "not installed: export does not work, all else does", extra)
    elif machine.runtime_error is not None:
        mend = f"pip install --force-reinstall --no-deps {there[0]}=={machine.installed[there[0]]}"
        yield Finding("broken", "onnxruntime", f"{shown} does not run: {machine.runtime_error}", mend)
    else:
        yield Finding("ok", "onnxruntime", shown)


def _cuda(machine: Machine) -> Iterator[Finding]:
    """Whether ONNX Runtime's CUDA is really used where its GPU build is installed: it falls back without an error."""
    if machine.provider is None:
        return
    if machine.provider == CUDA:
        yield Finding("ok", "CUDA in onnxruntime", "used when asked for")
    elif GPU_RUNTIME in machine.installed and machine.gpu:
        yield Finding(
            "broken", "CUDA in onnxruntime", f"asked for, but {machine.provider} runs: its libraries were not found",
            f"pip install --upgrade '{GPU_RUNTIME}[cuda,cudnn]'",
        )  # fmt: skip
    elif GPU_RUNTIME in machine.installed:
        smaller = f"pip uninstall -y {GPU_RUNTIME} && {_CPU} is a third of the size"
        yield Finding("note", "CUDA in onnxruntime", "there is no NVIDIA GPU here, so the CPU is used", smaller)
    elif machine.gpu:
        mend = f"pip uninstall -y {CPU_RUNTIME} && {_GPU}"
        yield Finding("note", "CUDA in onnxruntime", "the CPU build is installed beside an NVIDIA GPU", mend)


def _checkup_torch(machine: Machine) -> Iterator[Finding]:
    version = machine.installed.get("torch", "of unknown version")
    if machine.torch_sees:
        yield Finding("ok", "torch", f"{version}, CUDA {machine.torch_cuda}")
    elif not machine.gpu:
        yield Finding("ok", "torch", f"{version}, on CPU: there is no NVIDIA GPU")
    elif machine.torch_cuda is None:
        mend = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        yield Finding("broken", "torch", f"{version} was built without CUDA, and there is an NVIDIA GPU", mend)
    else:
        found = f"{version} wants CUDA {machine.torch_cuda} and cannot use the GPU"
        yield Finding("broken", "torch", found, "update the NVIDIA driver, or install a torch for an older CUDA")


def _triton(machine: Machine) -> Iterator[Finding]:
    version = machine.installed.get("triton")
    if version is not None:
        yield Finding("ok", "triton", version if machine.torch_sees else f"{version}, not used without CUDA")
    elif machine.torch_sees:
        yield Finding("broken", "triton", "not installed, and there is a GPU for its kernels", "pip install triton")
    else:
        yield Finding("note", "triton", "not installed: kernels cannot be imported, which only a GPU needs")


def _bf16(machine: Machine) -> Iterator[Finding]:
    if machine.bf16_pays and not machine.gpu:
        found = "this processor multiplies faster in it than in float32"
        yield Finding("ok", "bfloat16", found, "serve and train take --precision bf16")


PACKAGES = ("torch", "transformers", "peft", "tokenizers", "onnxruntime")


def environment() -> dict[str, Any]:
    """Hardware, versions and date, without which a number says nothing."""
    import torch

    versions = {"bertology-serve": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
