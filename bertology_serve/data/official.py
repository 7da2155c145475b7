"""The official metrics of well-known data sets, from a delta's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bertology_serve.data.formats import Fields, Row
from bertology_serve.data.sets import DataSet
from bertology_serve.tasks.fields import read_class
from bertology_serve.tasks.metrics import positive_f1
from bertology_serve.tasks.question_answering import exact, overlap_f1

Answers = Sequence[Fields]
Records = Sequence[Row]
ALSO_POSITIVE = ("true", "1")
"""What a set's positive label is called in files that hold JSON's booleans, or the class's number."""


def official_metrics(
    found: DataSet, measured: Mapping[str, float], answers: Answers, records: Records
) -> dict[str, float]:
    """The set's metrics by name, the main one first, as fractions.

    ``measured`` are those of the task. ``f1`` of a classification is the F1 of the set's ``positive`` label; MultiRC's
    ``f1a`` is that over all answers and ``em`` the share of questions answered without a mistake; ReCoRD's
    ``entity_em`` and ``entity_f1`` compare each query's likeliest entity with its gold ones.
    """
    own = dict(measured)
    if found.positive:
        gold, given = [read_class(*record)[0] for record in records], [str(one["label"]) for one in answers]
        positive = next(
            (label for label in (found.positive, *ALSO_POSITIVE) if label in (*gold, *given)), found.positive
        )
        own["f1"] = own["f1a"] = positive_f1(gold, given, positive)
        own |= _by_group(found, positive, answers, records) if any("group" in fields for fields, _ in records) else {}
    return {name: own[name] for name in found.metrics if name in own}


def _by_group(found: DataSet, positive: str, answers: Answers, records: Records) -> dict[str, float]:
    """The metrics over questions or queries."""
    groups: dict[str, list[tuple[Fields, Fields]]] = {}
    for answer, (fields, _) in zip(answers, records, strict=True):
        groups.setdefault(fields["group"], []).append((answer, fields))
    whole = [all(answer["label"] == read_class(fields, "")[0] for answer, fields in own) for own in groups.values()]
    scores = {"em": sum(whole) / len(whole)}
    if "entity_f1" in found.metrics:
        chosen = [max(own, key=lambda pair: pair[0]["scores"][positive])[1] for own in groups.values()]
        for name, score in (("entity_em", exact), ("entity_f1", overlap_f1)):
            best = [max((score(gold, one["entity"]) for gold in one["golds"]), default=0.0) for one in chosen]
            scores[name] = sum(best) / len(best)
    return scores
