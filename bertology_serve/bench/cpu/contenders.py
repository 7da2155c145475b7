"""Who takes part in ``bench cpu``: a table of environments, made from the package index, and one of contenders.

Options are filled in by ``Subject.places``: ``{work}`` is where its files lie, ``{base}`` the encoder,
``{checkpoint}`` the merged model as HuggingFace has it, ``{deltas}`` the folder of deltas, ``{form}`` and ``{pool}``
which of the two forms, ``{here}`` where a step writes, ``{made}`` where the last one did.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from bertology_serve.errors import SpecError
from bertology_serve.export.export_spec import Precision
from bertology_serve.serving.execution.engine_choice import Name as Engine

TORCH, TRANSFORMERS, OLDER = "torch==2.13.0", "transformers==5.23.0", "transformers==4.57.6"
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "openvino": ("openvino==2026.4.1", "nncf==3.4.0"),
    "ctranslate2": ("ctranslate2==4.8.5", TORCH, OLDER),
    "optimum": (TORCH, OLDER, "optimum-onnx[onnxruntime]==0.1.0"),
    "sentence-transformers": (TORCH, "sentence-transformers==6.2.0"),
    "sentence-transformers-onnx": (TORCH, OLDER, "sentence-transformers==5.1.2", "optimum-onnx[onnxruntime]==0.1.0"),
    "sentence-transformers-openvino": (TORCH, OLDER, "sentence-transformers==5.1.2", "optimum-intel[openvino]==1.27.0"),
    "fastembed": ("fastembed==0.9.1",),
    "peft": (TORCH, TRANSFORMERS, "peft==0.21.2"),
    "adapters": (TORCH, "adapters==1.3.0"),
    "olive": (TORCH, OLDER, "peft", "onnxruntime", "requests", "olive-ai==0.13.0"),
}
"""Requirements of each virtual environment; their pins exclude ours and each other's."""
INSTALLING = 1800
"""Seconds after which an installation is given up."""
MADE = "made.txt"
"""Lies in an environment that is complete: its requirements."""
Side = Literal["ours", "theirs"]
Step = tuple[str, str, Mapping[str, object]]
"""A maker of ``other_tools``, its environment, its options."""
LOGITS, ROWS = "logits", "rows"
"""The two forms of a model: with the task's head, and mean-pooled embeddings of unit length."""
ALONE, MIXED = "one model", "mixed deltas"


@dataclass(frozen=True)
class Contender:
    """``builder`` of ``our_tools`` where ``ours`` loads the package, else of ``other_tools``, opened with ``options``.

    ``environment`` "" is this one. ``forms`` are those that it has; the first is timed. ``family``: it takes part in
    the suites of one merged model, or in those of many deltas; ``only`` narrows that to suites of these names.
    """

    name: str
    side: Side
    precision: str
    builder: str
    options: Mapping[str, object]
    environment: str = ""
    package: bool = False
    steps: tuple[Step, ...] = ()
    forms: tuple[str, ...] = (LOGITS, ROWS)
    family: str = ALONE
    only: tuple[str, ...] = ()

    @property
    def off(self) -> float:
        """How far its answers may be from torch's, relative to them in norm, before its speed says nothing."""
        if self.precision == "fp32":
            return 1e-4 if self.side == "ours" else 0.02
        return 0.05 if self.precision == "16 bits" else 0.4


@dataclass(frozen=True)
class Suite:
    """Contenders of one ``family`` on the same weights. Ratios are to ``baseline``; answers are ``reference``'s."""

    name: str
    family: str
    workloads: Sequence[str]
    baseline: str
    reference: str


FORMS: dict[str, tuple[bool, Precision]] = {
    "ours, dense": (False, "fp32"),
    "ours, unpadded": (True, "fp32"),
    "ours, dense, int8-row": (False, "int8-row"),
    "ours, unpadded, int8-row": (True, "int8-row"),
    "ours, unpadded, int8-nbits": (True, "int8-nbits"),
    "ours, dense, int8-dynamic": (False, "int8-dynamic"),
    "ours, unpadded, int8-dynamic": (True, "int8-dynamic"),
}
"""Name -> whether padding is left out, and the precision."""
DENSE, UNPADDED = "ours, dense", "ours, unpadded"
DENSE_ROW, UNPADDED_ROW = f"{DENSE}, int8-row", f"{UNPADDED}, int8-row"
EAGER, ENGINE, ONNX_ENGINE = "torch eager", "our torch engine", "our ONNX engine"
OPTIMUM_O0, OPTIMUM_O3, OLIVE = "optimum O0", "optimum O3", "Olive"
ARRIVES, ARRANGED = "peft, as it arrives", "peft, sorted in 16s"


def slug(name: str) -> str:
    """A name as files have it."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _graph(name: str) -> str:
    return f"{{work}}/ours/{slug(name)}-{{form}}.onnx"


def _exported(name: str) -> Contender:
    precision = "fp32" if FORMS[name][1] == "fp32" else "8 bits"
    return Contender(name, "ours", precision, "onnxruntime", {"model": _graph(name)})


def _optimum(level: str) -> Step:
    return (
        "make_optimum",
        "optimum",
        {"checkpoint": "{checkpoint}", "target": "{here}", "level": level, "task": "{task}"},
    )


def _optimum_model(name: str, *steps: Step) -> Contender:
    precision = "8 bits" if "int8" in name else "fp32"
    return Contender(
        name, "theirs", precision, "onnxruntime", {"model": "{made}/model.onnx", "pool": "{pool}"}, steps=steps
    )


def _openvino(name: str, side: Side, model: str, quantise: bool | None = None, **more: object) -> Contender:
    """``quantise``: by calibration, or the weights alone; ``None`` leaves the graph as it is."""
    options: dict[str, object] = {"model": model, **more}
    steps: tuple[Step, ...] = ()
    if quantise is not None:
        ranges = {"calibration": "{work}/workloads/calibration.npz"} if quantise else {}
        steps = (("make_openvino", "openvino", {"model": model, "target": "{here}/model.xml", **ranges}),)
        options["model"] = "{made}/model.xml"
    precision = "8 bits" if steps else "16 bits" if more else "fp32"
    return Contender(name, side, precision, "openvino", options, "openvino", steps=steps)


def _ctranslate2(name: str, precision: str, compute: str) -> Contender:
    made: Step = "make_ctranslate2", "ctranslate2", {"checkpoint": "{work}/checkpoint-logits", "target": "{here}"}
    options = {"model": "{made}", "checkpoint": "{work}/checkpoint-logits", "compute": compute, "pool": "{pool}"}
    return Contender(name, "theirs", precision, "ctranslate2", options, "ctranslate2", steps=(made,))


def _engine(name: str, family: str, engine: str, precision: str = "fp32", **more: object) -> Contender:
    options = {"base": "{base}", "deltas": "{deltas}", "engine": engine, "precision": precision, **more}
    bits = {"fp32": "fp32", "bf16": "16 bits"}.get(precision, "8 bits")
    return Contender(name, "ours", bits, "engine", options, package=True, family=family)


def _peft(name: str, arranged: bool) -> Contender:
    options = {"base": "{base}", "deltas": "{deltas}", "arranged": arranged}
    return Contender(name, "theirs", "fp32", "peft", options, "peft", forms=(ROWS,), family=MIXED, only=LORA)


def _sentence_transformers(back_end: str, environment: str) -> Contender:
    options = {"checkpoint": "{checkpoint}", "back_end": back_end, "work": "{work}"}
    return Contender(f"sentence-transformers, {back_end}", "theirs", "fp32", "sentence_transformers", options,
                     environment, forms=(ROWS,))  # fmt: skip


LORA8, KINDS8, BITFIT8, LORA32 = "8 LoRA deltas", "8 deltas of 5 kinds", "8 BitFit deltas", "32 deltas of a row each"
LORA = (LORA8, LORA32)
_O0 = _optimum("O0")
_INT8: Step = "make_int8", "optimum", {"model": "{made}/model.onnx", "target": "{here}/model.onnx"}
_QDQ: Step = (*_INT8[:2], _INT8[2] | {"calibration": "{work}/workloads/calibration.npz"})  # type: ignore[operator]
_TORCH = {"checkpoint": "{checkpoint}", "pool": "{pool}"}
_OLIVE: Step = "make_olive", "olive", {"checkpoint": "{checkpoint}", "target": "{here}", "family": "{family}"}
COMPILED = "torch.compile"
NO_DELTA = ", no delta"
OPENVINO = tuple(name for name in get_args(Engine) if name == "openvino")
"""The engine's name, in versions that have it."""

CONTENDERS: tuple[Contender, ...] = (
    Contender(EAGER, "theirs", "fp32", "transformers", _TORCH),
    Contender("torch eager, bf16", "theirs", "16 bits", "transformers", _TORCH | {"dtype": "bfloat16"}),
    Contender("torch prepacked", "ours", "fp32", "transformers_prepacked", {"checkpoint": "{checkpoint}"}, package=True,
              forms=(LOGITS,)),
    Contender(COMPILED, "theirs", "fp32", "transformers", _TORCH | {"compiled": True}, forms=(LOGITS,)),
    *(_exported(name) for name in FORMS),
    _engine(ENGINE, ALONE, "torch"),
    _engine(f"{ENGINE}, bf16", ALONE, "torch", "bf16"),
    _engine(ONNX_ENGINE, ALONE, "onnx"),
    _engine(f"{ONNX_ENGINE}, int8-row", ALONE, "onnx", "int8-row"),
    *(_engine("our OpenVINO engine", ALONE, name) for name in OPENVINO),
    _openvino("OpenVINO", "theirs", _graph(DENSE)),
    _openvino("OpenVINO, bf16", "theirs", _graph(DENSE), hint="bf16"),
    _openvino("OpenVINO, int8 calibrated", "theirs", _graph(DENSE), True),
    _openvino("OpenVINO, int8 in groups of 128", "theirs", _graph(DENSE), False, group=128),
    _ctranslate2("CTranslate2", "fp32", "float32"),
    _ctranslate2("CTranslate2, int8", "8 bits", "int8"),
    _optimum_model(OPTIMUM_O0, _O0),
    _optimum_model(OPTIMUM_O3, _optimum("O3")),
    _optimum_model("ONNX Runtime, int8 dynamic", _O0, _INT8),
    _optimum_model("ONNX Runtime, int8 static", _O0, _QDQ),
    Contender(OLIVE, "theirs", "fp32", "onnxruntime", {"model": "{made}/model.onnx"}, steps=(_OLIVE,), forms=(LOGITS,)),
    _sentence_transformers("torch", "sentence-transformers"),
    _sentence_transformers("onnx", "sentence-transformers-onnx"),
    _sentence_transformers("openvino", "sentence-transformers-openvino"),
    Contender("fastembed", "theirs", "fp32", "fastembed", {"model": "{made}", "width": "{width}"}, "fastembed",
              steps=(_O0,), forms=(ROWS,)),
    *(
        _engine(f"{name}{end}", MIXED, engine, precision, **more)
        for name, engine, precision in (
            (ENGINE, "torch", "fp32"), (f"{ENGINE}, bf16", "torch", "bf16"), (ONNX_ENGINE, "onnx", "fp32"),
            (f"{ONNX_ENGINE}, int8-row", "onnx", "int8-row"),
            *(("our OpenVINO engine", name, "fp32") for name in OPENVINO),
        )
        for end, more in (("", {}), (NO_DELTA, {"changed": False}))
    ),
    _peft(ARRIVES, False),
    _peft(ARRANGED, True),
    Contender("adapters, BatchSplit", "theirs", "fp32", "adapters", {"base": "{base}", "deltas": "{deltas}"},
              "adapters", forms=(ROWS,), family=MIXED, only=LORA),
    Contender("merged sessions in turn", "theirs", "fp32", "sessions_in_turn", {"models": "{work}/merged/NAME.onnx"},
              forms=(ROWS,), family=MIXED, only=(LORA8,)),
    Contender("merged sessions in turn, int8-row", "theirs", "8 bits", "sessions_in_turn",
              {"models": "{work}/merged-int8-row/NAME.onnx"}, forms=(ROWS,), family=MIXED, only=(LORA8,)),
)  # fmt: skip
LEFT_OUT = {
    "llama.cpp": "its wheel is built from source (15 minutes on two busy cores were not enough), and the scripts that "
    "convert a checkpoint are in no package",
}
"""Whom one would look for in vain, and why."""


def python_of(environments: Mapping[str, Path], name: str) -> str | None:
    """The Python of an environment; ``None`` where it was not made. "" is this process's own."""
    if not name:
        return sys.executable
    python = environments.get(name, Path("/nowhere")) / "bin" / "python"
    return str(python.absolute()) if python.exists() else None  # not resolved: the link makes it the environment's


def make_environments(
    directory: Path, say: Callable[[str], None], names: Sequence[str] = tuple(ENVIRONMENTS)
) -> dict[str, str]:
    """Makes the environments that are not complete in ``directory``; what failed, by name, with pip's last line."""
    failed = {}
    for name in names:
        place, wanted = directory / name, "\n".join(ENVIRONMENTS[name]) + "\n"
        if (place / MADE).exists() and (place / MADE).read_text(encoding="utf-8") == wanted:
            say(f"{name}: there")
            continue
        say(f"{name}: {' '.join(ENVIRONMENTS[name])}")
        python = str(place / "bin" / "python")
        try:
            for command in (
                [sys.executable, "-m", "venv", str(place)],
                [python, "-m", "pip", "install", "--quiet", *ENVIRONMENTS[name]],
            ):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALLING)
        except subprocess.CalledProcessError as problem:
            lines = [line for line in problem.stderr.splitlines() if line.startswith("ERROR")] or [str(problem)]
            failed[name] = lines[0][:300]
        except subprocess.TimeoutExpired:
            failed[name] = f"pip took more than {INSTALLING} s"
        else:
            (place / MADE).write_text(wanted, encoding="utf-8")
    return failed


@dataclass(frozen=True)
class Chosen:
    """Who takes part, and on which workloads."""

    contenders: Sequence[Contender]
    workloads: Sequence[str]

    def takers(self, suite: Suite) -> list[Contender]:
        """Who takes part in a suite."""
        return [
            one for one in self.contenders if one.family == suite.family and suite.name in (one.only or (suite.name,))
        ]

    def has(self, line: Mapping[str, object]) -> bool:
        """Whether a line of a log is about these."""
        named = line.get("contender") in {one.name for one in self.contenders}
        return named and line.get("workload", self.workloads[0]) in self.workloads


def choose(only: str, workloads: Sequence[str], compiled: bool = False) -> Chosen:
    """Those whose names have one of the words of ``only``, which semicolons divide; of contenders and of workloads all
    where no word names one. What is compiled takes part where it is asked for.

    SpecError for a word that is in no name.
    """
    words = [word.strip().lower() for word in only.split(";") if word.strip()]
    taking = [one for one in CONTENDERS if compiled or not one.options.get("compiled")]
    for word in words:
        if not any(word in name.lower() for name in (*workloads, *(one.name for one in taking))):
            raise SpecError(
                f"--only {word!r} is in no name; workloads are {'; '.join(workloads)}; contenders are "
                f"{'; '.join(dict.fromkeys(one.name for one in taking))}"
            )
    chosen = [one for one in taking if any(word in one.name.lower() for word in words)]
    named = [name for name in workloads if any(word in name.lower() for word in words)]
    return Chosen(chosen or taking, named or workloads)
