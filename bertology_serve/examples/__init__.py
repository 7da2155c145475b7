"""Small data sets written for this project, one JSON Lines file per set and split, under the project's licence.

| set | task | records |
|---|---|---|
| sentiment | classification | ``text``, ``label``: positive or negative |
| intent | classification | ``text``, ``label``: one of eight requests to an assistant |
| entities | token classification | ``tokens``, ``tags``: BIO of PER, LOC, ORG |
| similarity | regression | ``text``, ``text_pair``, ``score`` from 0 to 5 |
| qa | question answering | ``question``, ``context``, ``answers`` as in SQuAD |
| choice | multiple choice | ``premise``, ``question``: cause or effect, ``choices``, ``label`` as in COPA |

``trees`` are sixty parsed sentences in CoNLL-U: what attention heads are compared with.

They are large enough to see a delta learn, and too small to compare methods with.
"""

from __future__ import annotations

from pathlib import Path

from bertology_serve.errors import NotFound, nearest

NAMES = ("sentiment", "intent", "entities", "similarity", "qa", "choice")
SPLITS = ("train", "dev")


def path(name: str, split: str) -> Path:
    """The file of one split of one set; raises NotFound for a name or split that does not exist."""
    if name not in NAMES:
        raise NotFound(f"no built-in examples {name!r}; {nearest(name, NAMES)}")
    if split not in SPLITS:
        raise NotFound(f"built-in examples have no split {split!r}; {nearest(split, SPLITS)}")
    return Path(__file__).parent / f"{name}.{split}.jsonl"


def trees() -> Path:
    """The parsed sentences."""
    return Path(__file__).parent / "trees.conllu"
