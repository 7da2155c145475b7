"""What the commands of ``bertology-serve analyze`` share: their subject, a report read back or made, and its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bertology_serve.cli.common import load_library, note, progress

if TYPE_CHECKING:
    from bertology_serve.analysis.report import AnalysisReport
    from bertology_serve.analysis.subject_model import Advance, Subject


def subject(backbone: str | None, delta: Path | None, device: str, *data: str | None) -> Subject:
    """The encoder, with the delta of a directory (or the newest of its versions) if there is one.

    ``data`` are files that must be there.
    """
    load_library(deltas=[delta], data=data, backbone=backbone, device=device)
    from bertology_serve.analysis.subject_model import Subject
    from bertology_serve.encoder.loading import find_device

    found = Subject.of(backbone, delta, find_device(device))
    found.encoder.prepack()
    return found


def kept(
    out: Path, again: bool, subjects: Sequence[Subject], files: Sequence[str | None], settings: Sequence[object],
    name: str, make: Callable[[Advance], AnalysisReport],
) -> AnalysisReport:  # fmt: skip
    """The report that lies in ``out``, where it is of the same subjects, files and settings, or a new one."""
    from bertology_serve.analysis.report import content_key, remembered

    key = content_key(name, subjects, files, *settings)
    with bar(name) as advance:
        report, lay_there = remembered(out, name, key, lambda: make(advance), again)
    if lay_there:
        note(f"nothing changed since {report.facts['date']}: read back from {out} (--again runs it again)")
    return report


@contextmanager
def bar(name: str) -> Iterator[Advance]:
    """A progress bar as the analyses tell it: (done, total)."""
    with progress() as shown:
        task = shown.add_task(name, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def written(report: AnalysisReport, out: Path) -> None:
    """Saves a report and says where it lies."""
    paths = report.save(out)
    note(f"{len(paths)} files in {out}: {', '.join(path.name for path in paths)}")
    if not any(path.suffix == ".png" for path in paths):
        note("no PNG: matplotlib is missing (pip install 'bertology-serve[plots]'); the HTML page has the figures")
