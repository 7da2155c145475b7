"""A delta and its encoder become a verified ONNX directory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bertology_serve.deltas import store
from bertology_serve.deltas.catalog import newest
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import Unsupported
from bertology_serve.export.back_ends import choose, write
from bertology_serve.export.cautions import cautions, lost
from bertology_serve.export.export_inputs import parts_of
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.layout import check_target, example, write_around, write_config
from bertology_serve.export.metadata import annotate, longest, metadata, save
from bertology_serve.export.samples import Reference, built_in, of_encodings
from bertology_serve.export.session import Session
from bertology_serve.export.verify import Bars, Report, check, verify, witnesses
from bertology_serve.files import replace_directory, staging
from bertology_serve.tasks.spec import Encoding


@dataclass(frozen=True)
class Exported:
    """A published export. ``bytes`` are those of the model; ``export_seconds`` and ``verify_seconds`` wall time.

    ``cautions`` are sentences on what the user should know before using it.
    """

    directory: Path
    report: Report
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
    """Writes a delta with its encoder as a verified ONNX directory; published only where ONNX Runtime and torch agree.

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
) -> Exported:
    """Writes ``out/onnx/model.onnx``, or where the layout has it, tokenizer, config.json, card and verification.json.

    ``records`` are encoded records to verify with, beside the built-in sentences. Raises Unsupported, naming the
    kinds, for a delta that cannot be folded (see ``check_foldable``); what ``Reference`` raises for a delta of another
    base; SpecError where ``out`` may not be written; VerificationError, with nothing published, where ONNX Runtime and
    torch differ.
    """
    spec, target = spec or ExportSpec(), out.absolute()
    check_target(target, spec.overwrite)
    _check_precision(encoder)
    delta = encoder.fitted(delta)
    check_foldable(encoder, delta, spec)
    reference = Reference(encoder, delta)
    started = time.perf_counter()
    parts = parts_of(encoder, delta, spec.merge)
    chosen = choose(parts, spec)
    model = write(parts, chosen, spec)
    facts = metadata(encoder, delta, parts, spec, chosen, name or delta.name)
    annotate(model, facts)
    with staging(target) as stage:
        file = stage / spec.model
        file.parent.mkdir(exist_ok=True)
        size = save(model, file)
        written = time.perf_counter()
        cases = [*built_in(encoder.tokenizer, longest(encoder, delta)), *of_encodings(records)]
        session, pad = Session(file, spec.provider), encoder.tokenizer.pad_token_id or 0
        report = verify(session, reference, cases, pad, Bars.of(spec, encoder.anatomy.layers))
        report = replace(report, witnesses=witnesses(encoder, delta, reference, cases))
        if spec.merge:
            report = replace(report, lost=lost(encoder.model.state_dict(), parts.state))
        check(report)
        warned = cautions(spec, report)
        write_around(stage, spec.model, encoder, delta, facts, report, warned)
        if spec.layout == "triton":
            write_config(stage, parts, gpu=spec.target == "cuda")
        replace_directory(stage, target)
    return Exported(
        out,
        report,
        size,
        written - started,
        time.perf_counter() - written,
        example(spec.model, facts, str(out)),
        warned,
    )


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
