"""Well-known data sets: what each asks, where it lies, what its columns are called, how it is officially measured.

Shapes turn rows of those sets into records of our tasks: each reads the hub's columns, or its authors' files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bertology_serve.data.formats import Fields, Row
from bertology_serve.errors import DataError, NotFound, nearest
from bertology_serve.tasks.fields import known_label, read_class
from bertology_serve.tasks.metrics import exact, overlap_f1, positive_f1
from bertology_serve.tasks.spec import (
    CLASSIFICATION,
    MULTIPLE_CHOICE,
    QUESTION_ANSWERING,
    REGRESSION,
    TOKEN_CLASSIFICATION,
)

Shape = Callable[[Fields, str], Iterator[Fields]]

TRUE, FALSE = "True", "False"


def plain(row: Fields, where: str) -> Iterator[Fields]:
    """The row as it is."""
    yield row


def copa(row: Fields, where: str) -> Iterator[Fields]:
    """COPA: the two choices in one list. A label that is the name of a column becomes its index."""
    choices = [_taken(row, where, name) for name in ("choice1", "choice2")]
    names = {"choice1": 0, "choice2": 1}
    label = row.get("label")
    yield {
        **_without(row, names),
        "choices": choices,
        "label": names.get(label, label) if isinstance(label, str) else label,
    }


def wic(row: Fields, where: str) -> Iterator[Fields]:
    """WiC as a pair: the word before the first sentence. (The benchmark's own baseline reads the words' vectors.)"""
    word, first, second = (_taken(row, where, name) for name in ("word", "sentence1", "sentence2"))
    yield {"text": f"{word}: {first}", "text_pair": second, "label": row.get("label")}


def wsc(row: Fields, where: str) -> Iterator[Fields]:
    """WSC as a pair: the text, and who the pronoun may be."""
    text, name, pronoun = (_taken(row, where, name) for name in ("text", "span1_text", "span2_text"))
    yield {"text": text, "text_pair": f"{pronoun}: {name}", "label": row.get("label")}


def multirc(row: Fields, where: str) -> Iterator[Fields]:
    """MultiRC as a pair: the paragraph, and question and answer; ``group`` is the question."""
    text, question, answer = (_taken(row, where, name) for name in ("paragraph", "question", "answer"))
    place = row.get("idx") or {}
    group = f"{place.get('paragraph')}/{place.get('question')}"
    yield {"text": text, "text_pair": f"{question} {answer}", "label": row.get("label"), "group": group}


def record(row: Fields, where: str) -> Iterator[Fields]:
    """ReCoRD as pairs: the passage, and the query with each entity in the gap; ``group`` is the query.

    ``entity`` and ``golds`` are what the official metric compares.
    """
    passage, query, entities = (_taken(row, where, name) for name in ("passage", "query", "entities"))
    golds = list(row.get("answers") or ())
    group = row.get("idx")
    for entity in dict.fromkeys(entities):
        label = TRUE if entity in golds else FALSE
        text = query.replace("@placeholder", entity)
        facts = {"group": str(group.get("query", where) if group else where), "entity": entity, "golds": golds}
        yield {"text": passage.replace("\n@highlight\n", " "), "text_pair": text, "label": label, **facts}


def mrqa(row: Fields, where: str) -> Iterator[Fields]:
    """MRQA: a question a record. The authors' files hold the questions of a context in ``qas``, after a header line."""
    if "header" in row:
        return
    context = _taken(row, where, "context")
    for asked in row.get("qas", (row,)):
        if "detected_answers" not in asked and "answers" in asked:
            yield asked  # SQuAD's own shape
            continue
        found = _taken(asked, where, "detected_answers")
        texts, starts = _hub_answers(found) if isinstance(found, Mapping) else _own_answers(found)
        answers = {"text": texts, "answer_start": starts}
        yield {"question": _taken(asked, where, "question"), "context": context, "answers": answers}


def _hub_answers(found: Fields) -> tuple[list[str], list[int]]:
    """``{"text": [...], "char_spans": [{"start": [...], "end": [...]}, ...]}``: the first place of each."""
    return list(found["text"]), [int(spans["start"][0]) for spans in found["char_spans"]]


def _own_answers(found: Sequence[Fields]) -> tuple[list[str], list[int]]:
    """``[{"text": ..., "char_spans": [[start, end], ...]}, ...]``."""
    return [one["text"] for one in found], [int(one["char_spans"][0][0]) for one in found]


def _taken(row: Fields, where: str, name: str) -> Any:
    if row.get(name) is None:
        raise DataError(f"{where}: column {name!r} is missing (columns found: {', '.join(map(str, row)) or 'none'})")
    return row[name]


def _without(row: Fields, names: Mapping[str, int]) -> Fields:
    return {name: value for name, value in row.items() if name not in names}


USUAL = {"train": "train", "dev": "validation", "test": "test"}


@dataclass(frozen=True)
class DataSet:
    """One data set. ``hub`` is its place there (``owner/name[@revision][:config]``; empty: only files are read).

    ``columns`` maps our fields to its columns; ``shape`` makes records of rows for which that is not enough.
    ``metrics`` are the official ones, the main one first; ``positive`` is the label whose F1 counts. ``splits`` maps
    our names (train, dev, test ...) to the hub's; ``subset`` names the part of a hub data set that holds several.
    """

    name: str
    task: str
    hub: str
    metrics: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    positive: str = ""
    splits: Mapping[str, str] = field(default_factory=USUAL.copy)
    shape: Shape = plain
    subset: str = ""


def set_named(name: str) -> DataSet:
    """``glue/mrpc``, or ``mrpc`` where one set alone is called so. Raises NotFound, naming the nearest."""
    if name in SETS:
        return SETS[name]
    found = [one for key, one in SETS.items() if name == key.partition("/")[2]]
    if len(found) != 1:
        if found:
            names = " and ".join(one.name for one in found)
            raise NotFound(f"the data set {name!r} is in {names}; say which (with a folder: {found[0].name}@FOLDER)")
        raise NotFound(f"the data set {name!r} is unknown; {nearest(name, SETS)}")
    return found[0]


def _glue(name: str, first: str, second: str = "", task: str = CLASSIFICATION, **values: object) -> DataSet:
    """A set of GLUE (Wang et al. 2018, arXiv 1804.07461)."""
    columns = {"text": first} | ({"text_pair": second} if second else {})
    metrics = values.pop("metrics", ("accuracy",))
    return DataSet(f"glue/{name}", task, f"nyu-mll/glue:{name}", metrics, columns, **values)  # type: ignore[arg-type]


def _super_glue(name: str, task: str = CLASSIFICATION, **values: object) -> DataSet:
    """A set of SuperGLUE (Wang et al. 2019, arXiv 1905.00537)."""
    metrics = values.pop("metrics", ("accuracy",))
    return DataSet(f"superglue/{name}", task, f"aps/super_glue:{name}", metrics, **values)  # type: ignore[arg-type]


def _mrqa(name: str, subset: str, split: str = "test") -> DataSet:
    """A set of MRQA 2019 (Fisch et al., arXiv 1910.09753); those out of domain have no training split."""
    splits = {"train": "train", "dev": "validation"} if split == "train" else {"dev": split}
    place = "mrqa-workshop/mrqa:plain_text"
    return DataSet(f"mrqa/{name}", QUESTION_ANSWERING, place, ("f1", "exact"), splits=splits, shape=mrqa, subset=subset)


_MATCHED = {
    "train": "train",
    "dev": "validation_matched",
    "mismatched": "validation_mismatched",
    "test": "test_matched",
}
_TWO = ("sentence1", "sentence2")


def _known(sets: Iterable[DataSet]) -> dict[str, DataSet]:
    return {one.name: one for one in sets}


SETS: Mapping[str, DataSet] = _known([
    _glue("mnli", "premise", "hypothesis", splits=_MATCHED),
    _glue("sst2", "sentence"),
    _glue("mrpc", *_TWO, metrics=("accuracy", "f1"), positive="equivalent"),
    _glue("cola", "sentence", metrics=("mcc",)),
    _glue("qnli", "question", "sentence"),
    _glue("qqp", "question1", "question2", metrics=("accuracy", "f1"), positive="duplicate"),
    _glue("rte", *_TWO),
    _glue("stsb", *_TWO, task=REGRESSION, metrics=("pearson", "spearman")),
    _glue("wnli", *_TWO),
    _super_glue("boolq", columns={"text": "question", "text_pair": "passage"}),
    _super_glue("cb", columns={"text": "premise", "text_pair": "hypothesis"}, metrics=("accuracy", "macro_f1")),
    _super_glue("copa", MULTIPLE_CHOICE, shape=copa),
    _super_glue("wic", shape=wic),
    _super_glue("rte", columns={"text": "premise", "text_pair": "hypothesis"}),
    _super_glue("multirc", shape=multirc, metrics=("f1a", "em"), positive="True"),
    _super_glue("record", shape=record, metrics=("entity_f1", "entity_em"), positive="True"),
    _super_glue("wsc", shape=wsc),
    _mrqa("squad", "SQuAD", "train"),
    _mrqa("textbookqa", "TextbookQA"),
    _mrqa("bioasq", "BioASQ"),
    _mrqa("race", "RACE"),
    _mrqa("re", "RelationExtraction"),
    _mrqa("duorc", "DuoRC.ParaphraseRC"),
    _mrqa("drop", "DROP"),
    DataSet("squad", QUESTION_ANSWERING, "rajpurkar/squad", ("f1", "exact")),
    DataSet("conll2003", TOKEN_CLASSIFICATION, "eriktks/conll2003@refs/convert/parquet", ("f1",), {"tags": "ner_tags"}),
    DataSet("wnut17", TOKEN_CLASSIFICATION, "", ("f1",)),
    DataSet("banking77", CLASSIFICATION, "mteb/banking77", ("accuracy",), {"label": "label_text"}),
    DataSet("clinc", CLASSIFICATION, "clinc/clinc_oos:plus", ("accuracy",), {"label": "intent"}),
    DataSet("snips", CLASSIFICATION, "", ("accuracy",)),
])  # fmt: skip
"""Every set by its name."""


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
        gold = [_gold(record, answer) for record, answer in zip(records, answers, strict=True)]
        given = [str(one["label"]) for one in answers]
        positive = next(
            (label for label in (found.positive, *ALSO_POSITIVE) if label in (*gold, *given)), found.positive
        )
        own["f1"] = own["f1a"] = positive_f1(gold, given, positive)
        own |= _by_group(found, positive, answers, records) if any("group" in fields for fields, _ in records) else {}
    return {name: own[name] for name in found.metrics if name in own}


def _gold(record: Row, answer: Fields) -> str:
    """A record's label as the delta that answers calls it."""
    label = read_class(*record)[0]
    return known_label(label, answer.get("scores") or {label: 1.0}, record[1], "label")


def _by_group(found: DataSet, positive: str, answers: Answers, records: Records) -> dict[str, float]:
    groups: dict[str, list[tuple[Fields, Fields]]] = {}
    for answer, (fields, _) in zip(answers, records, strict=True):
        groups.setdefault(fields["group"], []).append((answer, fields))
    whole = [all(answer["label"] == _gold((fields, ""), answer) for answer, fields in own) for own in groups.values()]
    scores = {"em": sum(whole) / len(whole)}
    if "entity_f1" in found.metrics:
        chosen = [max(own, key=lambda pair: pair[0]["scores"][positive])[1] for own in groups.values()]
        for name, score in (("entity_em", exact), ("entity_f1", overlap_f1)):
            best = [max((score(gold, one["entity"]) for gold in one["golds"]), default=0.0) for one in chosen]
            scores[name] = sum(best) / len(best)
    return scores
