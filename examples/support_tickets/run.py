"""A help desk's inbox: category, urgency, teams that were never trained, and whether somebody has asked before.

    python examples/support_tickets/run.py
    python examples/support_tickets/run.py --out deltas --text "The printer eats every second page."

Trains three small deltas on the fifty tickets in ``data`` and asks them, and the bare encoder, over HTTP.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bertology_serve as bs
from bertology_serve.cli.common import note, table
from bertology_serve.cli.demo import MINILM, serving
from bertology_serve.client import Client
from bertology_serve.data.records import read_records

TICKETS = Path(__file__).parent / "data" / "tickets.jsonl"
SOLVED: dict[str, Any] = {"task": "classification", "method": "probe", "recipe": "lp"}
DELTAS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> the column that it learns, and how
    "category": ("category", SOLVED),
    "urgency": ("urgency", SOLVED),
    "team": ("category", {"task": "zero-shot", "method": "lora", "batch_size": 16}),
}
TEAMS = ["refunds", "broken hardware", "privacy and security", "missing parcels", "feature requests"]
NEW = (
    "My new kettle leaks, and the water ran into the socket!",
    "Could you add the colour blue to the filter list?",
    "There is a stranger's name on my profile page.",
    "I paid, but the shop says that the order is still open.",
)
HELD_OUT = 6  # every sixth ticket is kept for measuring


def train(out: Path, epochs: int) -> None:
    """The deltas, and how good each is on the tickets that were kept back."""
    encoder, rows = bs.Encoder.load(MINILM), []
    for name, (column, settings) in DELTAS.items():
        records = [dict(fields) for fields, _ in read_records(str(TICKETS), {"label": column})]
        kept, others = records[::HELD_OUT], [row for i, row in enumerate(records) if i % HELD_OUT]
        more = {} if settings is SOLVED else {"epochs": epochs}
        delta = bs.train(encoder, others, eval=kept, out=out / name, overwrite=True, **settings, **more)
        found = f"accuracy {delta.metrics['accuracy']:.2f}"
        rows.append([name, delta.task.kind, " + ".join(delta.kinds), len(others), found])
    table("trained", ["delta", "task", "kind", "tickets", "on those kept back"], rows, stderr=False)


def nearest(client: Client, texts: Sequence[str]) -> list[tuple[float, str]]:
    """For each text the old ticket that is most like it, by the bare encoder's vectors."""
    old = [str(fields["text"]) for fields, _ in read_records(str(TICKETS))]
    table, asked = np.array(client.embed("base", old)), np.array(client.embed("base", texts))
    cosines = asked @ table.T
    return [(float(row.max()), old[int(row.argmax())]) for row in cosines]


def main() -> None:
    """Trains, serves, asks, and shows the inbox in the order in which it wants to be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the deltas go (default: nowhere lasting)")
    parser.add_argument("--text", action="append", help="a ticket of your own, in the place of the built-in ones")
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    texts, order = options.text or list(NEW), ("high", "normal", "low")
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder)
        train(out, options.epochs)
        with serving(out) as url, Client(url) as client:
            asked = [
                {"delta": name, "text": text, **({"labels": TEAMS} if name == "team" else {})}
                for text in texts
                for name in DELTAS
            ]
            answers = iter(client.answer(asked))
            found = [{name: next(answers).label or "" for name in DELTAS} for _ in texts]
            before = nearest(client, texts)
    rows = [
        [own["urgency"], own["category"], own["team"], text, f"{old} ({score:.2f})"]
        for own, text, (score, old) in zip(found, texts, before, strict=True)
    ]
    rows.sort(key=lambda row: order.index(row[0]))
    table("the inbox", ["urgency", "category", "team", "ticket", "most like"], rows, stderr=False)
    note("the teams were named in the call; no delta was trained on them")


if __name__ == "__main__":
    main()
