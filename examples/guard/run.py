"""A guard with redaction: whether a prompt is safe, what it is about, and what of it a language model may see.

    python examples/guard/run.py
    python examples/guard/run.py --out deltas --text "I am Tom Baker, call 555-0123 about my tax."

Trains three small deltas on sentences of the gateway example and asks them in one call. Names, cities, mail addresses
and numbers come back as placeholders, which are put back into what a language model answers.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import bertology_serve as bs
from bertology_serve.cli.common import note, table
from bertology_serve.cli.demo import MINILM, serving
from bertology_serve.client import Client
from bertology_serve.data.records import read_records
from bertology_serve.tasks.answers import Answer

DATA = Path(__file__).parents[1] / "gateway" / "data"
DELTAS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> the gateway's sentences that it learns from, and how
    "safety": ("jailbreak", {"task": "classification", "method": "probe", "recipe": "lp"}),
    "category": ("topic", {"task": "zero-shot", "layers": "top:2", "batch_size": 16, "epochs": 12}),
    "pii": ("pii", {"task": "token-classification", "batch_size": 4, "learning_rate": 2e-3, "epochs": 25}),
}
CATEGORIES = ["weapons", "money and tax", "medicine", "politics", "small talk"]
REDACTION = {"redact": "replace", "patterns": {"EMAIL": "replace", "PHONE": "replace", "IBAN": "replace"}}
TEXT = "I am Anna Meier from Berlin, my mail is anna.meier@example.com. May I pay my tax later?"


def train(out: Path, epochs: int | None) -> None:
    """The three deltas."""
    encoder = bs.Encoder.load(MINILM)
    for name, (source, settings) in DELTAS.items():
        note(f"training {name}")
        records = [dict(fields) for fields, _ in read_records(str(DATA / f"{source}.jsonl"))]
        more = {"epochs": epochs} if epochs and "epochs" in settings else {}
        bs.train(encoder, records, out=out / name, overwrite=True, **{"method": "lora", **settings, **more})


def model(prompt: str) -> str:
    """In the place of a language model: it sees placeholders, and answers with them."""
    return f"Thank you. You wrote: {prompt}"


def verdict(answers: dict[str, Answer]) -> str:
    """Why a prompt goes no further; empty where it may."""
    if answers["safety"].label == "jailbreak":
        return "it attacks the rules"
    return "it is about weapons" if answers["category"].label == "weapons" else ""


def main() -> None:
    """Trains, serves, asks, and shows what a language model sees and what its user gets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the deltas go (default: nowhere lasting)")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--epochs", type=int, help="for the LoRA deltas, in the place of their own")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder)
        train(out, options.epochs)
        with serving(out) as url, Client(url) as client:
            record = {"text": options.text, "labels": CATEGORIES, **REDACTION}  # each delta takes what is its own
            answers = client.ask_many(DELTAS, record)
    refused, found = verdict(answers), answers["pii"]
    redacted = found.redacted or options.text
    answer = f"refused: {refused}" if refused else model(redacted)
    rows = [
        ["asked", options.text],
        ["safety", f"{answers['safety'].label} ({answers['safety'].score:.2f})"],
        ["category", f"{answers['category'].label} ({answers['category'].score:.2f})"],
        ["the model sees", "nothing" if refused else redacted],
        ["the user gets", bs.restore(answer, found.placeholders or {})],
    ]
    table("one call", ["", ""], rows, stderr=False)


if __name__ == "__main__":
    main()
