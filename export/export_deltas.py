"""Many deltas of one encoder become one verified directory: a graph, all that is the deltas' own, and a card."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import onnx_ir

import bertology_serve
from bertology_serve.deltas.delta import Delta, bare
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import BaseMismatch, FormatError, SpecError
from bertology_serve.export.delta_library import FILE, Library, head_eps, library_of
from bertology_serve.export.emitter.emit import emit_answers
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import ExportSpec, MultiPrecision
from bertology_serve.export.exporting import Exported
from bertology_serve.export.layout import check_target, write_around
from bertology_serve.export.metadata import SEMANTICS, annotate, base_name, save
from bertology_serve.export.onnx_engine import parts_for
from bertology_serve.export.samples import Reference, built_in, of_encodings
from bertology_serve.export.session import Session
from bertology_serve.export.verify import Bars, Report, check, witnesses
from bertology_serve.export.verify_mixed import Mixed, verify_mixed
from bertology_serve.files import replace_directory, staging
from bertology_serve.tasks.spec import Encoding

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
    _check_spec(spec)
    check_target(target, spec.overwrite)
    references, started = references_of(encoder, deltas), time.perf_counter()
    parts, library = parts_for(encoder, INSTEAD), library_of(encoder, deltas)
    model = emit_answers(parts, spec.operators, spec.precision, head_eps(encoder))
    facts = facts_of(_base(encoder), parts, spec, name, min(one.max_length for one in library.cards))
    annotate(model, facts)
    with staging(target) as stage:
        file = stage / spec.model
        file.parent.mkdir(exist_ok=True)
        size = save(model, file)
        library.save(stage / FILE)
        written = time.perf_counter()
        report = _verified(stage, spec, encoder, library, references, records)
        write_around(stage, spec.model, encoder, _base(encoder), facts | {"delta_name": name}, report)
        (stage / "README.md").write_text(card(spec.model, facts, library, report), encoding="utf-8")
        replace_directory(stage, target)
    took = written - started, time.perf_counter() - written
    return Exported(out, report, size, *took, example(spec.model, facts, library, str(out)))


def join(encoder: Encoder, deltas: Sequence[Delta], directory: Path, spec: ExportSpec | None = None) -> Exported:
    """Puts further deltas behind those of an export; the graph stays the same file, byte for byte.

    What is new is verified, in batches mixed with the base. Raises NotFound, FormatError for what is no such export,
    BaseMismatch for one of another encoder, and what ``export_many`` raises; the export is left as it was then.
    """
    spec, target, started = spec or ExportSpec(), directory.absolute(), time.perf_counter()
    before, facts = Library.load(target / FILE), _facts(target / spec.model)
    if facts.get("base_sha256") != encoder.ref.sha256:
        raise BaseMismatch(f"{directory} was exported from other weights than {encoder.name}; give its --backbone")
    references, fresh = references_of(encoder, deltas), library_of(encoder, deltas)
    library = before.join(fresh.without_base())
    spec = replace(spec, precision=cast(MultiPrecision, facts["precision"]))
    with staging(target) as stage:
        shutil.copytree(target, stage, dirs_exist_ok=True)
        library.save(stage / FILE)
        written = time.perf_counter()
        numbers = [0, *range(len(before.cards), len(library.cards))]
        report = _verified(stage, spec, encoder, library, references, (), numbers)
        (stage / "README.md").write_text(card(spec.model, facts, library, report), encoding="utf-8")
        replace_directory(stage, target)
    took = written - started, time.perf_counter() - written
    size = (target / spec.model).stat().st_size
    return Exported(directory, report, size, *took, example(spec.model, facts, library, str(directory)))


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
) -> Report:
    """Runs the staged file; ``numbers`` [D] are the references' deltas in the library, all of them by default."""
    mixed = Mixed(Session(stage / spec.model), library, encoder.tokenizer.pad_token_id or 0)
    longest = min(one.max_length for one in library.cards)
    cases = [*built_in(encoder.tokenizer, longest), *of_encodings(records)]
    bars = Bars.of(spec, encoder.anatomy.layers)
    report = verify_mixed(mixed, references, numbers or range(len(references)), cases, bars)
    found = [one for reference in references for one in witnesses(encoder, reference.delta, reference, cases)]
    report = replace(report, witnesses=tuple(found))
    check(report)
    return report


def _check_spec(spec: ExportSpec) -> None:
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
    return bare("bare", encoder.ref, min(256, encoder.max_tokens))


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


def facts_of(base: Delta, parts: ExportInputs, spec: ExportSpec, name: str, longest: int) -> dict[str, str]:
    """Facts by name for the file's metadata. They name no delta: those may come later."""
    facts: dict[str, Any] = {
        "name": name,
        "task": "many",
        "deltas": f"{FILE}: all other inputs, safetensors; its metadata holds a card for each row of the tables",
        "max_length": longest,
        "base_name": base_name(base),
        "base_sha256": base.base.sha256,
        "base_family": base.base.family,
        "inputs": f"{', '.join(parts.inputs)}: {SEMANTICS}; delta: int64 [batch], the number of each row's delta",
        "outputs": OUTPUTS,
        "precision": spec.precision,
        "opset": spec.operators,
        "back_end": "direct",
        "unpadded": True,
        "tool": f"bertology-serve {bertology_serve.__version__}",
    }
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in facts.items()
    }


def example(model: str, facts: Mapping[str, str], library: Library, directory: str) -> str:
    """Lines of Python that run the file for two deltas at once, with nothing of this package."""
    inputs = facts["inputs"].split(":")[0].split(", ")
    last = len(library.cards) - 1
    return (
        f"import numpy, onnxruntime, safetensors.numpy, transformers\n"
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({directory!r})\n"
        f"stacks = safetensors.numpy.load_file({directory + '/' + FILE!r})\n"
        f"session = onnxruntime.InferenceSession({directory + '/' + model!r}, providers=['CPUExecutionProvider'])\n"
        f"texts = tokenizer(['A text.', 'Another one.'], padding=True, truncation=True, return_tensors='np')\n"
        f"rows = {{name: texts[name] for name in {inputs!r}}} | {{'delta': numpy.array([{last}, 0])}}\n"
        f"print(session.run([{library.cards[last].output!r}], rows | stacks)[0])"
    )


def card(model: str, facts: Mapping[str, str], library: Library, report: Report) -> str:
    """The model card."""
    deltas = "".join(
        f"| {number} | {one.name} | {one.version} | {one.task} | {one.output}[..., :{one.columns}] "
        f"| {', '.join(one.labels)} | {', '.join(one.kinds)} |\n"
        for number, one in enumerate(library.cards)
    )
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    return (
        f"# {facts['name']}\n\n`{model}` is {facts['base_name']} with inputs for many deltas, exported by "
        f"{facts['tool']}.\n\n{report.line()}.\n\n```python\n{example(model, facts, library, '.')}\n```\n\n"
        f"| number | delta | version | task | output | labels | kinds |\n|---|---|---|---|---|---|---|\n{deltas}\n"
        f"| | |\n|---|---|\n{rows}"
    )
