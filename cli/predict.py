"""``bertology-serve predict``: a file of items, each for a delta of its own, answered in mixed batches."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from bertology_serve.cli.common import load_library, note, progress, truncation
from bertology_serve.errors import NotFound

if TYPE_CHECKING:
    from bertology_serve.encoder.pipeline import Pipeline
    from bertology_serve.serving.offline import Lines


def predict(
    backbone: Annotated[str, typer.Option(help="Encoder: a hub id, a directory, or minilm.")],
    deltas: Annotated[Path, typer.Option(help="Directory of deltas: NAME/VERSION/ or bare ones.")],
    input: Annotated[
        str, typer.Option(help="JSON lines (.gz too), each with its delta and the fields of its task; - is stdin.")
    ],
    output: Annotated[str, typer.Option(help="Where the answers go, a line each; - is stdout.")],
    logits: Annotated[bool, typer.Option("--logits", help="Give the logits too.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Answer bad lines with their error and go on.")] = False,
    skip_bad_deltas: Annotated[
        bool, typer.Option("--skip-bad-deltas", help="Leave out deltas that cannot be loaded.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens a batch.", min=1)] = 2048,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    redact: Annotated[
        str,
        typer.Option(
            help="Redact texts of token classification: keep, mask, hash or replace; or by label, PER=hash,*=keep."
        ),
    ] = "",
    patterns: Annotated[
        str, typer.Option(help="Expressions to look for beside the model: all, or names, EMAIL,IBAN=hash.")
    ] = "",
    redaction_file: Annotated[
        Path | None, typer.Option(help="JSON file with the key of hashes and patterns of your own, as serve takes it.")
    ] = None,
) -> None:
    """Answer a file of JSON lines; lines for different deltas, kinds and tasks share their batches.

    The output appears when every line is answered. The first bad line ends the run (exit code 2) unless --skip-bad.
    """
    if input != "-" and not os.path.exists(input):
        raise NotFound(f"no file {input}; expected JSON lines, or - for standard input")
    load_library(root=deltas, backbone=backbone, device=device)
    from bertology_serve.files import check_outputs
    from bertology_serve.serving.offline import STANDARD, Lines, reading

    check_outputs([output], [input])
    with reading(input) as source:  # what is wrong there is said before anything is loaded
        asked = {
            "redact": _policies(redact, lambda policy: ("*", policy)),
            "patterns": _policies(patterns, lambda name: ("*" if name == "all" else name, "mask")),
        }
        fields = {name: policies for name, policies in asked.items() if policies}
        options = Lines("stdin" if input == STANDARD else input, logits, skip_bad, max_tokens, fields)
        pipeline = _open(backbone, deltas, skip_bad_deltas, device)
        if redaction_file is not None:
            from bertology_serve.tasks.redaction import Redactor

            pipeline.redactor = Redactor.read(redaction_file)
        started = time.perf_counter()
        count = _answer(pipeline, source, output, options, _lines_in(input))
    seconds = time.perf_counter() - started
    note(f"{count:,} answers in {seconds:.1f} s ({count / max(seconds, 1e-9):,.0f} a second)")


def _policies(text: str, bare: Callable[[str], tuple[str, str]]) -> dict[str, str]:
    """Policies by label, from an option; ``bare`` says what a part without ``=`` means."""
    parts = (part.partition("=") for part in text.split(",") if part)
    return dict((label, policy) if sign else bare(label) for label, sign, policy in parts)


def _open(backbone: str, deltas: Path, skip_bad: bool, device: str) -> Pipeline:
    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.encoder.loading import find_device
    from bertology_serve.encoder.pipeline import Pipeline
    from bertology_serve.serving.versions.delta_registry import Registry

    encoder = Encoder.load(backbone, device=find_device(device))
    pipeline = Pipeline(encoder)
    registry = Registry(pipeline)
    for refused in registry.load(deltas, skip_bad):
        note(f"left out: {refused.reason}")
    encoder.prepack()
    return pipeline


def _lines_in(name: str) -> int | None:
    """How many lines there are to answer, ``None`` where that is known only at the end."""
    if name.endswith(".gz") or not Path(name).is_file():
        return None
    from bertology_serve.data.formats import bounded_lines

    with open(name, "rb") as file:
        return sum(1 for _, line in bounded_lines(file, name) if not line.isspace())


def _answer(pipeline: Pipeline, source: IO[bytes], output: str, options: Lines, total: int | None) -> int:
    from bertology_serve.data.formats import bounded_lines
    from bertology_serve.serving.offline import answer_lines, writing

    count = cut = 0

    def was_cut() -> None:
        nonlocal cut
        cut += 1

    with writing(output) as target, progress() as bar:
        task = bar.add_task("predict", total=total)
        lines = (line for _, line in bounded_lines(source, options.name))
        for answer in answer_lines(pipeline, lines, options, was_cut):
            target.write(answer)
            count += 1
            bar.advance(task)
    if cut:
        note(truncation(cut, count))
    return count
