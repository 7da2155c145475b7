"""ONNX Runtime, imported when it is needed; and graphs that are kept as it has optimised them (``kept_session``)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

import bertology_serve
from bertology_serve.errors import Unsupported, VerificationError
from bertology_serve.export.export_spec import CPU
from bertology_serve.export.installation import environment
from bertology_serve.files import JsonMapping, cache_folder, hidden, is_own

log = logging.getLogger(__name__)

LOGITS, START, END, ROWS, POOLED = "logits", "start_logits", "end_logits", "last_hidden_state", "sentence_embedding"
SPARSE_WEIGHTS, VECTORS = "sparse_embedding", "token_embeddings"
"""Names of outputs in the files of single deltas."""


def answer(outputs: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic]:
    """What a file answers, of its outputs by name, also of files that have but one, whatever they call it.

    Logits [B, C] or [B, L, C]; of answers in texts [B, L, 2], start and end; of embeddings [B, H], sparse [B, V],
    multi-vector [B, L, D].
    """
    if START in outputs:
        return np.stack([outputs[START], outputs[END]], -1)
    return outputs[POOLED] if POOLED in outputs else next(iter(outputs.values()))


class Session:
    """A loaded ONNX file. ``asked`` is the provider that was wanted, ``provider`` the one that really runs it: ONNX
    Runtime falls back to the CPU without an error. ``runtime`` is its name and version. ``keep`` writes the graph as
    it was optimised to a file, which ``optimised`` loads in a third of the time.

    Raises Unsupported without ONNX Runtime, VerificationError where it cannot load the file.
    """

    def __init__(self, path: Path, provider: str = CPU, keep: Path | None = None, optimised: bool = False) -> None:
        runtime = _runtime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = torch.get_num_threads()
        if optimised:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if keep is not None:
            options.optimized_model_filepath = str(keep)
            # weights in a file of their own are mapped into memory: what is never read, most of the words, takes none
            options.add_session_config_entry(f"{_EXTERNAL}_file_name", WEIGHTS)
            options.add_session_config_entry(f"{_EXTERNAL}_min_size_in_bytes", "1024")
            # so are those that were laid out for this processor: processes share them, and unused ones take none
            options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        wanted = [name for name in (provider, CPU) if name in runtime.get_available_providers()]
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=list(dict.fromkeys(wanted)))
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            reason = str(error).strip().splitlines()[0][:200]
            raise VerificationError(f"ONNX Runtime {runtime.__version__} cannot load the file: {reason}") from error
        self.asked = provider
        self.provider: str = self._session.get_providers()[0]
        self.runtime = f"onnxruntime {runtime.__version__}"
        self._names = [found.name for found in self._session.get_outputs()]
        self.inputs: tuple[str, ...] = tuple(found.name for found in self._session.get_inputs())

    def run(self, arrays: Mapping[str, NDArray[np.generic]]) -> NDArray[np.float32]:
        """The ``answer``; arrays that the graph does not take are left out."""
        return np.asarray(answer(self.outputs(arrays)))

    def outputs(self, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.float32]]:
        outputs = self._session.run(self._names, {name: arrays[name] for name in self.inputs})
        return dict(zip(self._names, outputs, strict=True))


GRAPH, WEIGHTS, DIGESTS = "model.onnx", "model.onnx_data", "sha256.json"
_EXTERNAL = "session.optimized_model_external_initializers"
CPUINFO = Path("/proc/cpuinfo")
MOST_KEPT = 2 << 30
"""Bytes of graphs that are kept; those that were not used for longest leave first."""
SOURCES = (".", "deltas", "deltas/interop", "encoder", "export", "export/emitter", "families", "kinds", "tasks")
"""Folders of the library that a graph may follow from: other sources, other graphs."""


def kept_session(made_of: JsonMapping, make: Callable[[Path], object]) -> Session:
    """The session of a graph that ``make`` writes to a path, or that it wrote before for this user, of the same parts.

    ``made_of`` is all that the graph follows from, besides this machine's processor, the versions of what is installed
    and the library's sources. What is kept is loaded whole or not at all: it is made anew where its bytes are others
    than were written. Raises what ``Session`` and ``make`` do.
    """
    folder = cache_folder("graphs")
    place = None if folder is None else folder / graph_key(made_of)[:32]
    if place is not None and _whole(place):
        try:
            return Session(place / GRAPH, optimised=True)
        except VerificationError as problem:
            log.warning("%s; the graph is made anew", problem)
    with tempfile.TemporaryDirectory(prefix="bertology-serve-") as directory:
        path = Path(directory) / GRAPH
        make(path)
        if place is not None:
            try:
                with _keeping(place) as keep:
                    Session(path, keep=keep)
                return Session(place / GRAPH, optimised=True)  # its weights are mapped
            except (OSError, VerificationError) as problem:
                log.info("the graph is not kept: %s", problem)
        return Session(path)


def graph_key(made_of: JsonMapping) -> str:
    """SHA-256 of all that a graph follows from."""
    here = environment()
    digest = hashlib.sha256(json.dumps([made_of, here["cpu"], here["versions"]], default=str).encode())
    for source in sources():
        digest.update(source.read_bytes())
    with suppress(OSError):  # what the processor can do, as Linux says: two of one name may differ
        found = re.search(rb"^(flags|Features)\b.*$", CPUINFO.read_bytes(), re.MULTILINE)
        digest.update(found[0] if found else b"")
    return digest.hexdigest()


def drop_kept() -> None:
    """Removes this user's graphs: the next sessions make them anew."""
    folder = cache_folder("graphs")
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def sources() -> Iterator[Path]:
    """The files of the library that a graph may follow from."""
    root = Path(bertology_serve.__file__).parent
    return (path for name in SOURCES for path in sorted((root / name).glob("*.py")))


def _whole(place: Path) -> bool:
    """Whether a kept graph is this user's and has the bytes that were written; it has been used now."""
    try:
        written = json.loads((place / DIGESTS).read_text(encoding="utf-8"))
        whole = is_own(place) and bool(written == _digests(place))
        os.utime(place)
    except (OSError, ValueError):
        return False
    if not whole:
        log.warning("a graph that was kept is damaged: it is made anew")
    return whole


def _digests(place: Path) -> dict[str, str]:
    found = {}
    for name in (GRAPH, WEIGHTS):
        with (place / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@contextmanager
def _keeping(place: Path) -> Iterator[Path]:
    """A file to write a graph to, which is then kept at ``place``. Raises OSError."""
    stage = hidden(place)
    try:
        stage.mkdir(mode=0o700)
        yield stage / GRAPH
        (stage / DIGESTS).write_text(json.dumps(_digests(stage)), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)  # a damaged one
        stage.rename(place)
        _make_room(place)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _make_room(newest: Path) -> None:
    """Removes the graphs beside ``newest`` that were not used for longest, until all are small enough together."""
    by_age = sorted(newest.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in by_age}
    for path in by_age:
        if sum(sizes.values()) > MOST_KEPT:
            shutil.rmtree(path, ignore_errors=True)
            del sizes[path]


def silence() -> None:
    """ONNX Runtime says nothing on stderr any more; raises Unsupported where it is not installed."""
    _runtime().set_default_logger_severity(4)


def _runtime() -> ModuleType:
    try:
        return import_module("onnxruntime")
    except ImportError:
        raise Unsupported(
            "ONNX Runtime is not installed, which runs the ONNX engine and verifies every export; "
            "pip install 'bertology-serve[cpu]', or 'bertology-serve[gpu]' with an NVIDIA GPU (never both)"
        ) from None
