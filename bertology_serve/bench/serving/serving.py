"""``bench serving``: mixed LoRA deltas in one packed batch, beside peft's ``adapter_names`` and no delta at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bertology_serve.bench.serving import peft_contenders, serving_report
from bertology_serve.bench.serving.serving_report import Judged
from bertology_serve.bench.serving.texts_workload import Workload, lengths
from bertology_serve.bench.timing import Timed, interleave
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import VerificationError
from bertology_serve.export.installation import environment
from bertology_serve.serving.execution.engine_choice import Name

AGREE = 1e-4


@dataclass(frozen=True)
class Result:
    """``missing`` says why some contenders did not run, empty where all did."""

    times: list[Timed]
    judged: list[Judged]
    everything: dict[str, Any]
    missing: str = ""


def run(
    backbone: str,
    work: Workload,
    rounds: int,
    threads: int | None = None,
    advance: Callable[[], None] = lambda: None,
    engine: Name = "torch",
) -> Result:
    """Checks that this engine and peft give the same rows, then times them; VerificationError where they differ.

    Raises what ``apply`` raises for the engine.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    encoder = Encoder.load(backbone)
    deltas = peft_contenders.make_deltas(encoder, work)
    where = environment() | {"prepacked": encoder.prepack()}
    entries, missing = peft_contenders.ours(encoder, work, deltas, engine), ""
    where["engine"] = entries[0].engine
    try:
        others = peft_contenders.peft(encoder, work, deltas)
    except ImportError:
        others, missing = [], "peft is not installed (pip install peft): its rows are left out"
    for other in others:
        check(entries[0], other)
    times = interleave([*entries, *others], rounds, advance)
    judged = serving_report.judge(times)
    return Result(
        times, judged, serving_report.as_dict(work, backbone, sum(lengths(work)), times, judged, where), missing
    )


def check(one: peft_contenders.Contender, other: peft_contenders.Contender) -> None:
    """Raises VerificationError where two contenders that should agree give different rows."""
    difference = (one.run() - other.run()).abs().max().item()
    if not difference <= AGREE:
        raise VerificationError(
            f"{one.name!r} and {other.name!r} differ by {difference:.1e}; at most {AGREE:.0e} is rounding; "
            "nothing was timed"
        )
