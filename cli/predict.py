"""``bertology-serve predict``: files of items, each for a delta of its own, answered in mixed batches."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bertology_serve import __version__
from bertology_serve.cli.common import load_library, note, progress, truncation
from bertology_serve.errors import NotFound

if TYPE_CHECKING:
    from bertology_serve.serving.offline import PredictOptions
    from bertology_serve.serving.versions.delta_registry import Registry


def predict(
    backbone: Annotated[str, typer.Option(help="Encoder: a hub id, a directory, or minilm.")],
    deltas: Annotated[Path, typer.Option(help="Directory of deltas: NAME/VERSION/ or bare ones.")],
    input: Annotated[
        list[str],
        typer.Option(
            help="JSON lines (.gz too), each with its delta (or deltas) and the fields of its task; - is stdin. "
            "Several times, or a pattern in quotes: one file after the other."
        ),
    ],
    output: Annotated[str, typer.Option(help="Where the answers go, a line each; - is stdout.")],
    logits: Annotated[bool, typer.Option("--logits", help="Give the logits too.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Answer bad lines with their error and go on.")] = False,
    skip_bad_deltas: Annotated[
        bool, typer.Option("--skip-bad-deltas", help="Leave out deltas that cannot be loaded.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens a batch.", min=1)] = 2048,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    executors: Annotated[
        int, typer.Option(min=1, help="How many run batches, each a process: one a GPU, or on its share of the cores.")
    ] = 1,
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
    """Answer files of JSON lines; lines for different deltas, kinds and tasks share their batches.

    The output appears when every line is answered; the same command again goes on where a run was ended. The first bad
    line ends the run (exit code 2) unless --skip-bad.
    """
    inputs = [name for pattern in input for name in _files(pattern)]
    load_library(root=deltas, backbone=backbone, device=device)
    from bertology_serve.files import check_outputs
    from bertology_serve.serving.offline import AnswerFile, PredictOptions, answer_lines, reading

    check_outputs([output], inputs)
    files = [name for name in inputs if os.path.isfile(name)]
    for name in files:  # what is wrong there is said before anything is loaded
        with reading(name):
            pass
    asked = {
        "redact": _policies(redact, lambda policy: ("*", policy)),
        "patterns": _policies(patterns, lambda name: ("*" if name == "all" else name, "mask")),
    }
    fields = {name: policies for name, policies in asked.items() if policies}
    options, file = PredictOptions(logits, skip_bad, max_tokens, fields), AnswerFile(output)
    with _opened(backbone, deltas, skip_bad_deltas, device, executors, file.progress.prepack) as (registry, prepack):
        if redaction_file is not None:
            from bertology_serve.tasks.redaction import Redactor

            registry.pipeline.redactor = Redactor.read(redaction_file)
        key = _key(registry, options, redaction_file) if files == inputs else ""  # what else is read once only
        with file.opened(key, prepack), progress() as bar:
            lines, begun = file.rest(inputs), file.progress.lines
            if begun:
                note(f"going on after {begun:,} answers, where the run before ended")
            started = time.perf_counter()
            task = bar.add_task("predict", total=None if bar.disable else _count(inputs), completed=begun)
            for answered, answers in answer_lines(registry.pipeline, lines, options):
                file.write(answered, answers)
                bar.advance(task, len(answers))
    seconds, count, cut = time.perf_counter() - started, file.progress.lines, file.progress.cut
    if cut:
        note(truncation(cut, count))
    note(f"{count:,} answers in {seconds:.1f} s ({(count - begun) / max(seconds, 1e-9):,.0f} a second)")


def _files(pattern: str) -> list[str]:
    """The files that an option names. NotFound where there is none."""
    found = [pattern] if pattern == "-" or os.path.exists(pattern) else sorted(glob(pattern, recursive=True))
    if not found:
        raise NotFound(f"no file {pattern}; expected JSON lines, or - for standard input")
    return found


def _policies(text: str, bare: Callable[[str], tuple[str, str]]) -> dict[str, str]:
    """Policies by label, from an option; ``bare`` says what a part without ``=`` means."""
    parts = (part.partition("=") for part in text.split(",") if part)
    return dict((label, policy) if sign else bare(label) for label, sign, policy in parts)


@contextmanager
def _opened(
    backbone: str, deltas: Path, skip_bad: bool, device: str, executors: int, prepack: bool | None
) -> Iterator[tuple[Registry, bool | None]]:
    """The deltas over torch's engine, in this process or in several, and how it has laid out the weights."""
    import torch

    from bertology_serve.encoder.loading import find_device
    from bertology_serve.serving.execution.engine_choice import EngineConfig
    from bertology_serve.serving.execution.executor_handle import ForkServer, WorkerOptions
    from bertology_serve.serving.execution.startup import open_backbone
    from bertology_serve.serving.versions.delta_registry import Registry

    with ExitStack() as stack:
        several = stack.enter_context(ForkServer(WorkerOptions(backbone))) if executors > 1 else None
        opened = open_backbone(backbone, str(find_device(device)), torch.float32, several, executors=executors)
        stack.callback(opened.close)
        registry = Registry(opened.pipeline)
        for refused in registry.load(deltas, skip_bad):
            note(f"left out: {refused.reason}")
        yield registry, opened.settle(EngineConfig("torch", prepack=prepack))[1].prepack


def _key(registry: Registry, options: PredictOptions, redaction_file: Path | None) -> str:
    """What the answers follow from beside the lines: this version, encoder, the deltas' files, options."""
    files = [file for card in registry.tiers.cards.values() for file in sorted(card.path.iterdir())]
    looked = [
        (str(one), one.stat().st_size, one.stat().st_mtime_ns) for one in [*files, *filter(None, [redaction_file])]
    ]
    return hashlib.sha256(repr((__version__, registry.pipeline.encoder.ref, options, looked)).encode()).hexdigest()


def _count(names: Sequence[str]) -> int | None:
    """How many lines there are to answer, ``None`` where that is known only at the end."""
    from bertology_serve.serving.offline import read_lines

    if any(name.endswith(".gz") or not Path(name).is_file() for name in names):
        return None
    return sum(1 for _ in read_lines(names))
