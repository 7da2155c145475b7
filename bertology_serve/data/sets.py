"""Well-known data sets: what each asks, where it lies, what its columns are called, how it is officially measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bertology_serve.data import shapes
from bertology_serve.data.shapes import Shape
from bertology_serve.errors import NotFound, nearest
from bertology_serve.tasks.spec import (
    CLASSIFICATION,
    MULTIPLE_CHOICE,
    QUESTION_ANSWERING,
    REGRESSION,
    TOKEN_CLASSIFICATION,
)

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
    shape: Shape = shapes.plain
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
    return DataSet(
        f"mrqa/{name}", QUESTION_ANSWERING, place, ("f1", "exact"), splits=splits, shape=shapes.mrqa, subset=subset
    )


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
    _super_glue("copa", MULTIPLE_CHOICE, shape=shapes.copa),
    _super_glue("wic", shape=shapes.wic),
    _super_glue("rte", columns={"text": "premise", "text_pair": "hypothesis"}),
    _super_glue("multirc", shape=shapes.multirc, metrics=("f1a", "em"), positive="True"),
    _super_glue("record", shape=shapes.record, metrics=("entity_f1", "entity_em"), positive="True"),
    _super_glue("wsc", shape=shapes.wsc),
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
