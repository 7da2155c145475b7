"""Deltas and their encoder become a verified directory: one delta by itself, or many that share a graph."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray

import bertology_serve
from bertology_serve.deltas import store
from bertology_serve.deltas.catalog import newest
from bertology_serve.deltas.delta import Delta, bare
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import BaseMismatch, FormatError, SpecError, Unsupported
from bertology_serve.export import web_layout
from bertology_serve.export.delta_library import FILE, Library, head_eps, library_of
from bertology_serve.export.emitter.emit import choose, emit_answers, write
from bertology_serve.export.export_directory import (
    SEMANTICS,
    annotate,
    as_texts,
    base_name,
    check_target,
    example,
    longest,
    metadata,
    save,
    write_config,
    write_directory,
)
from bertology_serve.export.export_inputs import ExportInputs, plain_texts
from bertology_serve.export.export_spec import ExportSpec, MultiPrecision
from bertology_serve.export.onnx_engine import bare_inputs, check_emitted
from bertology_serve.export.openvino_ir import OpenVinoSession, save_ir
from bertology_serve.export.samples import Case, Reference, built_in, of_encodings
from bertology_serve.export.session import Session
from bertology_serve.export.verify import (
    ManyDeltasFile,
    SingleFile,
    Tolerance,
    Verification,
    cautions,
    check,
    lost,
    witnesses,
)
from bertology_serve.files import replace_directory, staging
from bertology_serve.tasks.spec import Encoding


@dataclass(frozen=True)
class Exported:
    """A published export. ``bytes`` are those of the model; ``export_seconds`` and ``verify_seconds`` wall time.

    ``cautions`` are sentences on what the user should know before using it.
    """

    directory: Path
    report: Verification
    bytes: int
    export_seconds: float
    verify_seconds: float
    example: str
    cautions: tuple[str, ...] = ()


def export(
    delta: Delta | str | Path,
    out: str | Path,
    encoder: Encoder | None = None,
    *,
    name: str | None = None,
    **settings: Any,
) -> Exported:
    """Writes a delta with its encoder as a verified directory; published only where its runtime and torch agree.

    ``settings`` are fields of ``ExportSpec``: ``merge=True``, ``precision="int8-row"``. Raises Unsupported for what
    cannot be folded or written, VerificationError where the outputs differ, SpecError where ``out`` may not be written.
    """
    if not isinstance(delta, Delta):
        path = newest(Path(delta))
        delta = store.load(path) if encoder is None else encoder.read_delta(path)
    return export_delta(encoder or Encoder.for_delta(delta), delta, Path(out), ExportSpec(**settings), name=name)


def export_delta(
    encoder: Encoder,
    delta: Delta,
    out: Path,
    spec: ExportSpec | None = None,
    *,
    name: str | None = None,
    records: Iterable[Sequence[Encoding]] = (),
    calibrate: Iterable[Sequence[Encoding]] = (),
) -> Exported:
    """Writes ``out/onnx/model.onnx``, or where the layout has it, tokenizer, config.json, card and verification.json.

    ``records`` are encoded records to verify with, beside the built-in sentences; ``calibrate`` those that the scales
    of int8-static are taken from, instead of built-in sentences, 400 sequences at most. Raises Unsupported, naming the
    kinds, for a delta that cannot be folded (see ``check_foldable``); what ``Reference`` raises for a delta of another
    base; SpecError where ``out`` may not be written; VerificationError, with nothing published, where its runtime and
    torch differ.
    """
    spec, target = spec or ExportSpec(), out.absolute()
    if spec.layout == "web":
        raise SpecError("--layout web is for many deltas; give --multi with it, also for a single one")
    check_target(target, spec.overwrite)
    _check_precision(encoder)
    delta = encoder.fitted(delta)
    check_foldable(encoder, delta, spec)
    reference = Reference(encoder, delta)
    started = time.perf_counter()
    export_inputs = ExportInputs.of(encoder, delta, spec.merge, spec.precision)
    to_openvino = spec.target == "openvino"
    graph = replace(spec, precision="fp32") if to_openvino else spec  # NNCF rounds it afterwards
    back_end = choose(export_inputs, graph)
    facts = metadata(encoder, delta, export_inputs, spec, back_end, name or delta.name)
    model = annotate(write(export_inputs, back_end, graph), facts)
    with staging(target) as stage:
        file = stage / spec.model
        texts = _calibration(encoder, calibrate, export_inputs) if spec.precision == "int8-static" else ()
        size = save_ir(model, file, texts) if to_openvino else save(model, file)
        written = time.perf_counter()
        cases = [*built_in(encoder.tokenizer, longest(encoder, delta)), *of_encodings(records)]
        cases = cases if delta.task.token_types else [case.untyped() for case in cases]
        session = OpenVinoSession(file) if to_openvino else Session(file, spec.provider)
        verified = SingleFile(session, reference, encoder.tokenizer.pad_token_id or 0)
        report = verified.verify(cases, Tolerance.of(spec, encoder.anatomy.layers))
        report = replace(report, witnesses=witnesses(encoder, delta, reference, cases))
        if spec.merge:
            report = replace(report, lost=lost(encoder.model.state_dict(), export_inputs.state))
        check(report)
        warned = cautions(spec, report)
        write_directory(stage, spec.model, encoder, delta, facts, report, warned)
        if spec.layout == "triton":
            write_config(stage, export_inputs, gpu=spec.target == "cuda")
        replace_directory(stage, target)
    took = written - started, time.perf_counter() - written
    return Exported(out, report, size, *took, example(spec.model, facts, str(out)), warned)


CALIBRATED, SHORT = 400, 64
"""The most sequences that scales are taken from, and how many of them count cut to 1 to 8 tokens too."""


def _calibration(
    encoder: Encoder, records: Iterable[Sequence[Encoding]], export_inputs: ExportInputs
) -> list[dict[str, NDArray[np.int64]]]:
    """Inputs by name [1, L] of each sequence, so that no padding counts.

    A sequence of few tokens has inputs larger than any of a sentence: [CLS] alone is off by a fifth without such.
    """
    texts = list(islice(chain.from_iterable(records), CALIBRATED)) or plain_texts(encoder, CALIBRATED)
    few = [Encoding(one.ids[:n], one.types[:n]) for one, n in zip(texts[:SHORT], cycle(range(1, 9)), strict=False)]
    cases = (Case((text,), len(text), left=False).arrays(0) for text in texts + few)
    return [{name: case[name] for name in export_inputs.inputs} for case in cases]


def _check_precision(encoder: Encoder) -> None:
    if encoder.device.type != "cpu" or encoder.dtype != torch.float32:
        raise Unsupported(
            f"the encoder is {encoder.dtype} on {encoder.device}; load it in float32 on CPU: there weights fold exactly"
        )


def check_foldable(encoder: Encoder, delta: Delta, spec: ExportSpec) -> None:
    """Raises Unsupported where merging was asked for and something cannot be folded, unless it may be baked."""
    stuck = delta.effects(encoder.anatomy).unfoldable
    if spec.merge and stuck and not spec.bake:
        raise Unsupported(
            f"delta {delta.name!r} cannot be merged: its {' and '.join(stuck)} cannot be folded into the weights; "
            f"give --bake to make that part of the graph, or leave out --merge"
        )


PRECISIONS = get_args(MultiPrecision)
INSTEAD = "export each delta by itself, without --multi"


def export_many(
    encoder: Encoder,
    deltas: Sequence[Delta],
    out: Path,
    spec: ExportSpec | None = None,
    *,
    name: str = "deltas",
    records: Iterable[Sequence[Encoding]] = (),
) -> Exported:
    """Writes the graph, ``stacks.safetensors`` and what HuggingFace's tools look for into ``out``.

    The base stands at number 0, the deltas follow. ``records`` are encoded records to verify with, beside the built-in
    sentences. Raises SpecError for options that do not fit and for names that repeat, Unsupported for an encoder or a
    delta that cannot go into such a graph, what ``Reference`` raises for a delta of another base, VerificationError,
    with nothing published, where ONNX Runtime and torch differ.
    """
    spec, target = spec or ExportSpec(), out.absolute()
    _check_options(spec)
    check_target(target, spec.overwrite)
    references, started = references_of(encoder, deltas), time.perf_counter()
    export_inputs, library = bare_inputs(encoder, spec.precision, INSTEAD), library_of(encoder, deltas)
    check_emitted(export_inputs, INSTEAD)
    model = emit_answers(export_inputs, spec.operators, spec.precision, head_eps(encoder))
    facts = facts_of(_base(encoder), export_inputs, spec, name, min(one.max_length for one in library.cards))
    with staging(target) as stage:
        size = save(annotate(model, facts), stage / spec.model)
        library = _saved(stage, spec.layout == "web", encoder, deltas, library)
        written = time.perf_counter()
        report = _verified(stage, spec, encoder, library, references, records)
        write_directory(stage, spec.model, encoder, _base(encoder), facts | {"delta_name": name}, report)
        (stage / "README.md").write_text(many_card(spec, facts, library, report), encoding="utf-8")
        replace_directory(stage, target)
    took = written - started, time.perf_counter() - written
    return Exported(out, report, size, *took, many_example(spec, facts, library, str(out)))


def join(encoder: Encoder, deltas: Sequence[Delta], directory: Path, spec: ExportSpec | None = None) -> Exported:
    """Puts further deltas behind those of an export; the graph stays the same file, byte for byte.

    What is new is verified, in batches mixed with the base. Raises NotFound, FormatError for what is no such export,
    BaseMismatch for one of another encoder, and what ``export_many`` raises; the export is left as it was then.
    """
    spec, target, started = spec or ExportSpec(), directory.absolute(), time.perf_counter()
    web = (target / web_layout.MANIFEST).is_file()
    before = web_layout.load(target, encoder) if web else Library.load(target / FILE)
    facts = _facts(target / spec.model)
    if facts.get("base_sha256") != encoder.ref.sha256:
        raise BaseMismatch(f"{directory} was exported from other weights than {encoder.name}; give its --backbone")
    references, fresh = references_of(encoder, deltas), library_of(encoder, deltas)
    library = before.join(fresh.without_base())
    spec = replace(spec, precision=cast(MultiPrecision, facts["precision"]), layout="web" if web else spec.layout)
    with staging(target) as stage:
        shutil.copytree(target, stage, dirs_exist_ok=True)
        library = _saved(stage, web, encoder, deltas, library)
        written = time.perf_counter()
        numbers = [0, *range(len(before.cards), len(library.cards))]
        report = _verified(stage, spec, encoder, library, references, (), numbers)
        (stage / "README.md").write_text(many_card(spec, facts, library, report), encoding="utf-8")
        replace_directory(stage, target)
    took = written - started, time.perf_counter() - written
    size = (target / spec.model).stat().st_size
    return Exported(directory, report, size, *took, many_example(spec, facts, library, str(directory)))


def _saved(stage: Path, web: bool, encoder: Encoder, deltas: Sequence[Delta], library: Library) -> Library:
    """Writes the rows of a library, ``deltas`` its last ones; returns what is to be verified, read back for the web."""
    if not web:
        library.save(stage / FILE)
        return library
    web_layout.save(stage, encoder, deltas)
    return web_layout.load(stage, encoder)


def references_of(encoder: Encoder, deltas: Iterable[Delta]) -> list[Reference]:
    """The base and each delta alone on the torch engine."""
    return [Reference(encoder, delta) for delta in (_base(encoder), *deltas)]


def _verified(
    stage: Path,
    spec: ExportSpec,
    encoder: Encoder,
    library: Library,
    references: Sequence[Reference],
    records: Iterable[Sequence[Encoding]],
    numbers: Sequence[int] | None = None,
) -> Verification:
    """Runs the staged file; ``numbers`` [D] are the references' deltas in the library, all of them by default."""
    cases = [*built_in(encoder.tokenizer, min(one.max_length for one in library.cards)), *of_encodings(records)]
    session, pad = Session(stage / spec.model), encoder.tokenizer.pad_token_id or 0
    file = ManyDeltasFile(session, library, references, numbers or range(len(references)), pad)
    report = file.verify(cases, Tolerance.of(spec, encoder.anatomy.layers))
    found = [one for reference in references for one in witnesses(encoder, reference.delta, reference, cases)]
    report = replace(report, witnesses=tuple(found))
    check(report)
    return report


def _check_options(spec: ExportSpec) -> None:
    """The options that make no sense for many deltas at once."""
    wrong = {
        "--merge": spec.merge,
        "--back-end torch": spec.back_end == "torch",
        "--layout triton": spec.layout == "triton",
        "--no-unpad": spec.unpad is False,
        f"--target {spec.target}": spec.target != "cpu",
        f"--precision {spec.precision}": spec.precision not in PRECISIONS,
    }
    for flag in (flag for flag, given in wrong.items() if given):
        raise SpecError(f"{flag} does not go with --multi, whose graph is unpadded and folds nothing; leave it out")


def _base(encoder: Encoder) -> Delta:
    return bare("bare", encoder.ref, encoder.base_task)


def _facts(path: Path) -> Mapping[str, str]:
    """The metadata of a graph for many deltas."""
    try:
        facts = onnx_ir.load(path).metadata_props
    except Exception as problem:  # a protobuf that is none raises what it likes
        raise FormatError(f"{path} is no ONNX file ({type(problem).__name__}); export with --multi first") from None
    if facts.get("task") != "many" or facts.get("precision") not in PRECISIONS:
        raise FormatError(f"{path} is no graph for many deltas; export with --multi first, then join")
    return dict(facts)


OUTPUTS = (
    "logits [batch, labels], token_logits [batch, sequence, labels], embedding [batch, hidden]: float32, before any "
    "softmax; a sequence's answer is in the output and the first columns that its delta's card names, zero elsewhere"
)


def facts_of(base: Delta, export_inputs: ExportInputs, spec: ExportSpec, name: str, longest: int) -> dict[str, str]:
    """Facts by name for the file's metadata. They name no delta: those may come later."""
    facts: dict[str, object] = {
        "name": name,
        "task": "many",
        "deltas": f"{FILE}: all other inputs, safetensors; its metadata holds a card for each row of the tables",
        "max_length": longest,
        "base_name": base_name(base),
        "base_sha256": base.base.sha256,
        "base_family": base.base.family,
        "inputs": f"{', '.join(export_inputs.inputs)}: {SEMANTICS}; delta: int64 [batch], "
        "the number of each row's delta",
        "outputs": OUTPUTS,
        "precision": spec.precision,
        "opset": spec.operators,
        "back_end": "direct",
        "unpadded": True,
        "tool": f"bertology-serve {bertology_serve.__version__}",
    }
    return as_texts(facts)


def many_example(spec: ExportSpec, facts: Mapping[str, str], library: Library, directory: str) -> str:
    """Lines that run the file: of Python for two deltas, with nothing of this package; for the web of JavaScript."""
    inputs, last = facts["inputs"].split(":")[0].split(", "), library.cards[-1]
    if spec.layout == "web":
        return (
            'import { Pipeline } from "bertology-serve-web";\n'
            f'const pipeline = await Pipeline.open("{directory}/");\n'
            f'console.log(await pipeline.answer([{{ delta: "{last.name}", text: "A text." }}]));'
        )
    model = f"{directory}/{spec.model}"
    return (
        f"import numpy, onnxruntime, safetensors.numpy, transformers\n"
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({directory!r})\n"
        f"stacks = safetensors.numpy.load_file({directory + '/' + FILE!r})\n"
        f"session = onnxruntime.InferenceSession({model!r}, providers=['CPUExecutionProvider'])\n"
        f"texts = tokenizer(['A text.', 'Another one.'], padding=True, truncation=True, return_tensors='np')\n"
        f"rows = {{name: texts[name] for name in {inputs!r}}} | "
        f"{{'delta': numpy.array([{len(library.cards) - 1}, 0])}}\n"
        f"print(session.run([{last.output!r}], rows | stacks)[0])"
    )


def many_card(spec: ExportSpec, facts: Mapping[str, str], library: Library, report: Verification) -> str:
    """The model card."""
    deltas = "".join(
        f"| {number} | {one.name} | {one.version} | {one.task} | {one.output}[..., :{one.columns}] "
        f"| {', '.join(one.labels)} | {', '.join(one.kinds)} |\n"
        for number, one in enumerate(library.cards)
    )
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    return (
        f"# {facts['name']}\n\n`{spec.model}` is {facts['base_name']} with inputs for many deltas, exported by "
        f"{facts['tool']}.\n\n{report.line()}.\n\n```{'js' if spec.layout == 'web' else 'python'}\n"
        f"{many_example(spec, facts, library, '.')}\n```\n\n"
        f"| number | delta | version | task | output | labels | kinds |\n|---|---|---|---|---|---|---|\n{deltas}\n"
        f"| | |\n|---|---|\n{rows}"
    )
