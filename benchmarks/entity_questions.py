"""Tagged tweets as questions, for a domain far from SQuAD's: WNUT17's entities become answers.

    python benchmarks/entity_questions.py ../shared/data/wnut17/test.jsonl.gz --out DATA/other.jsonl

One question for each kind of entity that a tweet has; every entity of that kind is a gold answer. MRQA's
RelationExtraction is made of such templates about slots too (Levy et al. 2017, arXiv 1706.04115). The tweet is its
tokens with a space between, as they come; nothing is cut or chosen. What two answers reach that read no question is
printed beside: the whole context, and its longest run of words with capitals.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bertology_serve.data.records import read_records
from bertology_serve.tasks.metrics import squad_scores
from bertology_serve.tasks.token_classification import join_words, spans_of

QUESTIONS = {
    "person": "Who is named?",
    "location": "Which place is named?",
    "corporation": "Which company is named?",
    "product": "Which product is named?",
    "creative-work": "Which film, book, song or show is named?",
    "group": "Which band, team or group is named?",
}


def main() -> None:
    """Writes JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    records = [record for fields, _ in read_records(asked.file) for record in questions(fields)]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    answers, words = (
        statistics.fmean(counts)
        for counts in zip(*((len(one["answers"]["text"]), len(one["context"].split())) for one in records), strict=True)
    )
    print(f"{asked.out}: {len(records):,} questions; {answers:.1f} answers and {words:.0f} words each")
    golds, contexts = ([one["answers"]["text"] for one in records], [one["context"] for one in records])
    for name, given in (("the whole context", contexts), ("its capitals", list(map(capitals, contexts)))):
        print(f"{name}: F1 {100 * squad_scores(golds, given)['f1']:.1f}")


def questions(fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The questions of one tagged text."""
    context, words = join_words(tuple(fields["tokens"]))
    found: dict[str, list[tuple[int, int]]] = {}
    for kind, first, last in spans_of(fields["tags"]):
        found.setdefault(kind, []).append((words[first][0], words[last - 1][1]))
    for kind, spans in found.items():
        texts = [context[start:end] for start, end in spans]
        answers = {"text": texts, "answer_start": [start for start, _ in spans]}
        yield {"question": QUESTIONS[kind], "context": context, "answers": answers}


def capitals(context: str) -> str:
    """The longest run of words that begin with a capital; the context where there is none."""
    runs = re.findall(r"[A-Z][\w.-]*(?: [A-Z][\w.-]*)*", context)
    return max(runs, key=len, default=context)


if __name__ == "__main__":
    main()
