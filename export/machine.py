"""What this machine has: installed distributions, a GPU, and what torch and ONNX Runtime really use."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from bertology_serve.errors import BertologyError
from bertology_serve.export.spec import CUDA

OURSELVES = "bertology-serve"
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidia0"))


@dataclass(frozen=True)
class Machine:
    """``installed`` are versions by normalised distribution name; ``required`` what ours asks for, as metadata has it
    (``None`` where it is not installed as a distribution). ``gpu``: an NVIDIA driver is there.

    ``torch_cuda`` is the CUDA that torch was built for, ``torch_sees`` whether it can use it. ``provider`` is what ONNX
    Runtime runs on when CUDA is asked for, ``runtime_error`` why it runs nothing at all.
    """

    installed: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] | None = None
    gpu: bool = False
    torch_cuda: str | None = None
    torch_sees: bool = False
    provider: str | None = None
    runtime_error: str | None = None


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


def _runtime() -> tuple[str | None, str | None]:
    """The provider that runs a small file when CUDA is asked for, or why none does."""
    try:
        from bertology_serve.export.direct.nodes import Nodes, Output
        from bertology_serve.export.onnx_file import save
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
