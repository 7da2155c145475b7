"""Where a run works and where its delta goes: what it needs to continue, what it is, how the delta came to be.

``PARENT/.NAME.run/`` holds ``run.json`` (what the run is), ``config.toml`` (the same as flags),
``checkpoint.safetensors`` (where it stands) and ``log.jsonl`` (what it did); a recipe's finished stages lie in
``stage-N/``, each the directory of a delta. It goes when the delta is published; the log and the settings go into the
delta's directory.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import bertology_serve
from bertology_serve.deltas.catalog import check_name, check_place, is_delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import FormatError, InputError, SpecError
from bertology_serve.files import JsonObject, replacing, write_json
from bertology_serve.training.batches import Data
from bertology_serve.training.methods import ParameterCount
from bertology_serve.training.train_config import TrainConfig

LOG, LAYERS, CONFIG, SKIPPED = "log.jsonl", "layers.json", "config.toml", "skipped.txt"


class RunDirectory:
    """The run that will write the delta ``out``."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.parent / f".{out.name}.run"

    def check_free(self, resume: bool, overwrite: bool) -> None:
        """Raises InputError where a delta or an unfinished run is in the way."""
        empty = not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir()))
        if not empty and not is_delta(self.out):
            raise InputError(f"{self.out} exists and is no delta's directory; choose another --out")
        if not empty and not overwrite:
            raise InputError(f"{self.out} exists; choose another --out, or replace it with --overwrite")
        if self._stored.exists() and not (resume or overwrite):
            raise InputError(
                f"an unfinished run for {self.out} lies in {self.path}; continue it with --resume, or discard it with "
                "--overwrite"
            )

    def open(self, identity: JsonObject, machine: JsonObject, resume: bool) -> JsonObject:
        """Begins a run or, with ``resume``, finds the one to continue; returns ``machine`` as it was at the beginning.

        Raises InputError where the run found has another ``identity``, naming the field.
        """
        stored = self._read() if resume else None
        if stored is not None:
            self._check_same(stored["identity"], identity)
            return dict(stored["machine"])
        self.remove()
        self.path.mkdir(parents=True)
        write_json(self._stored, {"identity": identity, "machine": machine})
        return dict(machine)

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, object]) -> None:
        write_checkpoint(self._checkpoint, tensors, state)

    def load(self, stage: int = 0) -> tuple[dict[str, Tensor], JsonObject] | None:
        """The stage's checkpoint to continue from; the log is cut back to it. ``None``: begin at the first step."""
        found = read_checkpoint(self._checkpoint) if self._checkpoint.exists() else None
        if found is not None and found[1].get("stage", 0) != stage:
            found = None  # of the stage before
        self._cut_log(stage, found[1]["step"] if found else -1)
        return found

    def stage(self, number: int) -> Path:
        """Where the delta of a recipe's finished stage lies."""
        return self.path / f"stage-{number}"

    @property
    def features(self) -> Path:
        """Where features of the frozen encoder are kept, for every run whose delta lies beside this one."""
        return self.out.parent / ".features"

    @property
    def unfinished(self) -> bool:
        return self._stored.exists()

    def log(self, record: Mapping[str, object]) -> None:
        with (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_config(self, text: str) -> None:
        """Leaves the settings of the run, as ``train --config`` takes them."""
        (self.path / CONFIG).write_text(text, encoding="utf-8")

    def write_layers(self, layers: Sequence[JsonObject]) -> None:
        write_json(self.path / LAYERS, {"layers": layers})

    def write_skipped(self, lines: Sequence[str]) -> None:
        """Leaves what was wrong with the records that were skipped, a line each, where there are any."""
        if lines:
            (self.path / SKIPPED).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def extras(self) -> list[Path]:
        """The files that are to lie beside the delta, those that there are."""
        return [self.path / name for name in (LOG, LAYERS, CONFIG, SKIPPED)]

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def _stored(self) -> Path:
        return self.path / "run.json"

    def _read(self) -> JsonObject | None:
        if not self._stored.exists():
            return None
        try:
            stored: JsonObject = json.loads(self._stored.read_text(encoding="utf-8"))
            if isinstance(stored["identity"], dict) and isinstance(stored["machine"], dict):
                return stored
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise FormatError(f"{self._stored} does not describe a run; begin again with --overwrite")

    def _check_same(self, stored: JsonObject, identity: JsonObject) -> None:
        known = json.loads(json.dumps(identity))
        for name in sorted({*stored, *known}):
            if stored.get(name) != known.get(name):
                raise InputError(
                    f"{self.path} holds another run: {name} was {stored.get(name)!r} and is now {known.get(name)!r}; "
                    "give what it was to --resume, or begin again with --overwrite"
                )

    def _cut_log(self, stage: int, step: int) -> None:
        path = self.path / LOG
        if path.exists():
            whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            path.write_text("".join(line for line in whole if _place(line) <= (stage, step)), encoding="utf-8")


class Follower(RunDirectory):
    """The same as a process that does not lead sees it: it reads, and writes nothing."""

    def open(self, identity: JsonObject, machine: JsonObject, resume: bool) -> JsonObject:
        """What ``machine`` was at the beginning is for the leader to say."""
        return {}

    def _ignored(self, *given: object, **named: object) -> None:
        return

    save = log = write_config = write_layers = write_skipped = remove = _cut_log = _ignored


def _place(line: str) -> tuple[int, int]:
    values = json.loads(line)
    return values.get("stage", 0), values["step"]


@dataclass(frozen=True)
class Destination:
    """``out`` becomes the delta's directory, or with a ``version`` holds it as ``out/version``.

    ``name`` defaults to the directory's own. ``resume`` continues an unfinished run of the same configuration and data,
    if there is one; ``overwrite`` replaces a delta that stands there, once the new one is proven.
    """

    out: Path
    name: str | None = None
    version: str | None = None
    resume: bool = False
    overwrite: bool = False

    def beside(self, suffix: str) -> Destination:
        """The place of a second product, ``NAME-SUFFIX``. A run that is continued may have published it already."""
        name, directory = self.open()
        replaces = self.overwrite or (self.resume and directory.unfinished)
        out = Path(os.path.abspath(self.out))
        return replace(self, out=out.with_name(f"{out.name}-{suffix}"), name=f"{name}-{suffix}", overwrite=replaces)

    def open(self) -> tuple[str, RunDirectory]:
        """The delta's name, and the run directory beside its place, which must be free.

        Raises FormatError for names that cannot be and for a place where the delta would not be found under its name,
        SpecError where names clash, InputError where something is in the way.
        """
        out = Path(os.path.abspath(self.out))
        plain = re.sub(r"[^a-z0-9._-]+", "-", out.name.lower()).strip("-._")
        name = check_name(self.name or plain, "delta name")
        if self.version is not None:
            check_name(self.version, "version")
            if out.name != name:
                raise SpecError(f"with --version, --out ends in the delta's name: got {out.name!r}, expected {name!r}")
            out = out / self.version
        check_place(out, name)
        directory = RunDirectory(out)
        directory.check_free(self.resume, self.overwrite)
        return name, directory


# What may change between a run and its continuation, because no number depends on it.
FREE = ("save_every", "checkpointing")


def identity(config: TrainConfig, encoder: Encoder, name: str, data: Data, processes: int = 1) -> JsonObject:
    """What a run and its continuation must have in common."""
    own = {key: value for key, value in config.as_dict().items() if key not in FREE}
    return own | {
        "name": name,
        "backbone": f"{encoder.name}, weights {encoder.ref.sha256[:12]}",
        "device": encoder.device.type if processes == 1 else f"{encoder.device.type}, {processes} processes",
        "train": data.train.fingerprint,
        "eval": data.dev.fingerprint if data.dev else None,
        "ood": data.ood.fingerprint if data.ood else None,
    }


def provenance(
    config: TrainConfig, counts: ParameterCount, state: RunState, data: Data, encoder: Encoder, processes: int = 1
) -> JsonObject:
    """How the delta came to be."""
    device, several = encoder.device, f"{processes} processes, " if processes > 1 else ""
    return {
        "training": config.as_dict(),
        "train": data.train.facts(),
        "eval": data.dev.facts() if data.dev else None,
        **({"ood": data.ood.facts()} if data.ood else {}),
        "kept": f"step {state.best_step if config.eval.keep == 'best' and data.dev else state.step} of {state.step}",
        **({"start": state.start} if state.start else {}),
        "trained_parameters": counts.trained,
        "seconds": round(state.seconds, 1),
        "hardware": several + torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{several}CPU, {torch.get_num_threads()} threads",
        "versions": {
            "bertology-serve": bertology_serve.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, object]) -> None:
    """Replaces the file ``path``: a kill at any moment leaves the old one or the new."""
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with replacing(path) as own:
        save_file(copies, own, metadata={"state": json.dumps(state)})


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """The tensors and the state; raises FormatError where the file is not a whole checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return tensors, json.loads(file.metadata()["state"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        line = " ".join(str(error).split())
        raise FormatError(f"{path} is no checkpoint of a run: {line}; begin again with --overwrite") from None


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's random generators as tensors [bytes]."""
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(device: torch.device, states: Mapping[str, Tensor]) -> None:
    """The inverse of ``random_state``."""
    torch.set_rng_state(states["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in states:
        torch.cuda.set_rng_state(states["rng.cuda"], device)


@dataclass
class RunState:
    """``stage`` counts a recipe's stages from 1, and is 0 where there is but one. ``epoch`` and ``offset`` are the
    sampler's place; ``best`` is the highest dev metric and, where several steps reached it, the highest negative loss
    among them; ``best_step`` got there.

    ``metrics`` are those of the state that is kept, ``stale`` counts evaluations since ``best_step``, ``stopped`` says
    that patience ran out, ``seconds`` is the time spent so far. ``start`` is where training
    began: ``contrastive``, or ``probe`` where the dev set found that no better; empty where it was not tried.
    """

    stage: int = 0
    step: int = 0
    epoch: int = 0
    offset: int = 0
    best: list[float] = field(default_factory=list)
    best_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    stopped: bool = False
    seconds: float = 0.0
    start: str = ""

    def as_dict(self) -> JsonObject:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: JsonObject) -> RunState:
        return cls(**values)
