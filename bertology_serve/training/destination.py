"""Where a trained delta goes, and what it is called there."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from bertology_serve.deltas.catalog import check_place
from bertology_serve.deltas.names import check_name
from bertology_serve.errors import SpecError
from bertology_serve.training.rundir import RunDirectory


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
