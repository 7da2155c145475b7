"""The data of a run, and the facts about it that a delta remembers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from bertology_serve.data.records import DataLike, Record, name_of, read_records


@dataclass(frozen=True)
class Source:
    """Records, the name of the file or data set that they came from, and the columns that held their fields."""

    name: str
    records: Sequence[Record]
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, data: DataLike, columns: Mapping[str, str] | None = None) -> Source:
        """All records of a file, a data set or what is in memory; see ``read_records``."""
        return cls(name_of(data), read_records(data, columns), columns or {})

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of the fields of all records, in order."""
        digest = hashlib.sha256()
        for fields, _ in self.records:
            digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """What two equal sources have in common."""
        return f"{len(self.records)} rows, sha256 {self.sha256[:12]}"

    def facts(self) -> dict[str, object]:
        """Name, rows and hash, and columns where any were named, for provenance."""
        facts = {"name": self.name, "rows": len(self.records), "sha256": self.sha256}
        return {**facts, "columns": dict(self.columns)} if self.columns else facts


@dataclass(frozen=True)
class Data:
    """The sources of a run: ``dev`` chooses the state that is kept, ``ood``, of another domain, is only measured."""

    train: Source
    dev: Source | None = None
    ood: Source | None = None

    def names(self, backbone: str) -> dict[str, str]:
        """The backbone and the sources by the names of their flags."""
        named = {"backbone": backbone, "train": self.train.name}
        others = {"eval": self.dev, "ood": self.ood}
        return named | {flag: source.name for flag, source in others.items() if source is not None}
