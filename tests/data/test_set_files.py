from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bertology_serve.data.records import load_examples, read_records
from bertology_serve.data.set_files import FOLDER, find_set, has_split, locate, parse
from bertology_serve.data.sets import SETS, set_named
from bertology_serve.errors import DataError, NotFound
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import CLASSIFICATION, TOKEN_CLASSIFICATION, TaskSpec

# One row of each set as the hub has it, and what our tasks read of it.
PAIR = {"label": "x"}
QA = {"question": "who ?", "context": "it was Ada ."}
SPANS = {"text": ["Ada"], "char_spans": [{"start": [7], "end": [9]}]}
ANSWER = {"text": ["Ada"], "answer_start": [7]}
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "glue/mnli": ({"premise": "a", "hypothesis": "b", **PAIR}, {"text": "a", "text_pair": "b"}),
    "glue/sst2": ({"sentence": "a", "idx": 0, **PAIR}, {"text": "a"}),
    "glue/mrpc": ({"sentence1": "a", "sentence2": "b", **PAIR}, {"text": "a", "text_pair": "b"}),
    "glue/cola": ({"sentence": "a", **PAIR}, {"text": "a"}),
    "glue/qnli": ({"question": "a", "sentence": "b", **PAIR}, {"text": "a", "text_pair": "b"}),
    "glue/qqp": ({"question1": "a", "question2": "b", **PAIR}, {"text": "a", "text_pair": "b"}),
    "glue/rte": ({"sentence1": "a", "sentence2": "b", **PAIR}, {"text": "a", "text_pair": "b"}),
    "glue/stsb": ({"sentence1": "a", "sentence2": "b", "label": 2.5}, {"text": "a", "text_pair": "b", "label": 2.5}),
    "glue/wnli": ({"sentence1": "a", "sentence2": "b", **PAIR}, {"text": "a", "text_pair": "b"}),
    "superglue/boolq": ({"question": "a", "passage": "b", **PAIR}, {"text": "a", "text_pair": "b"}),
    "superglue/cb": ({"premise": "a", "hypothesis": "b", **PAIR}, {"text": "a", "text_pair": "b"}),
    "superglue/copa": (
        {"premise": "a", "question": "cause", "choice1": "b", "choice2": "c", "label": "choice2"},
        {"premise": "a", "question": "cause", "choices": ["b", "c"], "label": 1},
    ),
    "superglue/wic": (
        {"word": "w", "sentence1": "a", "sentence2": "b", "start1": 0, **PAIR},
        {"text": "w: a", "text_pair": "b", "label": "x"},
    ),
    "superglue/rte": ({"premise": "a", "hypothesis": "b", **PAIR}, {"text": "a", "text_pair": "b"}),
    "superglue/multirc": (
        {"paragraph": "a", "question": "q", "answer": "b", "idx": {"paragraph": 3, "question": 4, "answer": 5}, **PAIR},
        {"text": "a", "text_pair": "q b", "group": "3/4"},
    ),
    "superglue/record": (
        {"passage": "a\n@highlight\nb", "query": "@placeholder came", "entities": ["Ada"], "answers": ["Ada"],
         "idx": {"passage": 1, "query": 2}},
        {"text": "a b", "text_pair": "Ada came", "label": "True", "group": "2", "entity": "Ada", "golds": ["Ada"]},
    ),
    "superglue/wsc": (
        {"text": "Ada left as she was late .", "span1_text": "Ada", "span2_text": "she", **PAIR},
        {"text": "Ada left as she was late .", "text_pair": "she: Ada"},
    ),
    **{name: ({**QA, "subset": one.subset, "detected_answers": SPANS, "answers": ["Ada"]}, {**QA, "answers": ANSWER})
       for name, one in SETS.items() if name.startswith("mrqa/")},
    "squad": ({**QA, "answers": ANSWER}, {**QA, "answers": ANSWER}),
    "conll2003": ({"tokens": ["Ada"], "ner_tags": ["B-PER"], "pos_tags": [1]}, {"tokens": ["Ada"], "tags": ["B-PER"]}),
    "wnut17": ({"tokens": ["Ada"], "tags": ["O"]}, {"tokens": ["Ada"], "tags": ["O"]}),
    "banking77": ({"text": "a", "label": 3, "label_text": "age_limit"}, {"text": "a", "label": "age_limit"}),
    "clinc": ({"text": "a", "intent": "translate"}, {"text": "a", "label": "translate"}),
    "snips": ({"text_a": "a", **PAIR}, {"text_a": "a"}),
}  # fmt: skip


def spec(name: str, records: Any) -> TaskSpec:
    kind = SETS[name].task
    labels: set[str] = set()
    for fields, _ in records:
        labels |= {str(fields["label"])} if kind == CLASSIFICATION else set(fields.get("tags", ()))
    return TaskSpec(kind, labels=tuple(labels) if kind in (CLASSIFICATION, TOKEN_CLASSIFICATION) else ())


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("name", SETS)
def test_every_set_becomes_records_that_its_task_reads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    row, expected = ROWS[name]
    write(tmp_path / name / "dev.jsonl", row)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    records = read_records(f"set:{name}:dev")
    (fields, where), = records  # fmt: skip
    assert expected.items() <= fields.items()
    assert where == f"{tmp_path / name / 'dev.jsonl'}:1"
    task = task_for(spec(name, records))
    assert task.example(fields, where, labelled=True).where == where
    assert load_examples(f"set:{name}:dev", task)


def test_the_hub_is_asked_where_there_is_no_file(monkeypatch: pytest.MonkeyPatch):
    class Rows(list):
        features: dict[str, Any] = {}  # noqa: RUF012

    asked = []

    def load_dataset(*place: Any, **more: Any) -> Rows:
        asked.append((*place, more))
        if "mrqa" in place[0]:
            return Rows([{"subset": subset, **QA, "detected_answers": SPANS} for subset in ("DROP", "RACE")])
        return Rows([ROWS["conll2003"][0]])

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delenv(FOLDER, raising=False)
    assert len(read_records("set:mrqa/drop:dev")) == 1, "the other subset is not this set's"
    read_records("set:conll2003")
    assert asked == [
        ("mrqa-workshop/mrqa", "plain_text", {"split": "test"}),
        ("eriktks/conll2003", None, {"split": "train", "revision": "refs/convert/parquet"}),
    ]
    with pytest.raises(NotFound, match=r"mrqa/drop has no split 'train'"):
        read_records("set:mrqa/drop:train")
    with pytest.raises(NotFound, match=r"set:snips:dev: snips is read from files; put them below the folder"):
        read_records("set:snips:dev")


def test_a_folder_names_its_set(tmp_path: Path):
    write(tmp_path / "mrpc" / "train.jsonl", {"text_a": "a", "text_b": "b", "label": "equivalent"})
    write(tmp_path / "glue" / "sst2" / "validation.jsonl", ROWS["glue/sst2"][0])
    assert find_set(str(tmp_path / "mrpc")) is SETS["glue/mrpc"]
    assert read_records(f"set:{tmp_path / 'mrpc'}:train")[0].fields == {
        "text_a": "a",
        "text_b": "b",
        "label": "equivalent",
    }
    assert read_records(f"set:{tmp_path / 'glue' / 'sst2'}:dev")[0].fields["text"] == "a"
    with pytest.raises(NotFound, match=r"holds no file of the split 'test'; expected test\.jsonl"):
        read_records(f"set:{tmp_path / 'mrpc'}:test")


def test_a_set_may_be_named_with_its_folder(tmp_path: Path):
    write(tmp_path / "rte" / "dev.jsonl", ROWS["superglue/rte"][0])
    with pytest.raises(NotFound, match="'rte' is in glue/rte and superglue/rte"):
        read_records(f"set:{tmp_path / 'rte'}:dev")
    assert read_records(f"set:superglue/rte@{tmp_path / 'rte'}:dev")[0].fields["text_pair"] == "b"
    assert has_split(f"superglue/rte@{tmp_path / 'rte'}", "dev")
    assert not has_split(f"superglue/rte@{tmp_path / 'rte'}", "test")


def test_authors_files_of_mrqa(tmp_path: Path):
    asked = {
        "question": "who ?",
        "detected_answers": [{"text": "Ada", "char_spans": [[7, 9]], "token_spans": [[2, 2]]}],
    }
    write(
        tmp_path / "squad" / "dev.jsonl",
        {"header": {"dataset": "SQuAD"}},
        {"context": QA["context"], "qas": [asked] * 2},
    )
    write(tmp_path / "mrqa" / "squad" / "dev.jsonl", {"header": {}}, {"context": QA["context"], "qas": [asked] * 2})
    records = read_records(f"set:{tmp_path / 'mrqa' / 'squad'}:dev")
    assert [record.fields for record in records] == [{**QA, "answers": ANSWER}] * 2


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(FOLDER, raising=False)
    assert parse("set:glue/mrpc:dev") == ("glue/mrpc", "dev")
    assert parse("set:glue/mrpc") == ("glue/mrpc", "train")
    assert set_named("mrpc") is SETS["glue/mrpc"]
    assert locate(SETS["glue/mrpc"], "dev") is None
    with pytest.raises(NotFound, match="the data set 'rte' is in glue/rte and superglue/rte"):
        set_named("rte")
    with pytest.raises(NotFound, match="the data set 'glue/mprc' is unknown; did you mean 'glue/mrpc'"):
        read_records("set:glue/mprc:train")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("glue/mrpc", {"sentence1": "a", "label": "x"}, r"dev.jsonl:1: no column 'sentence2' for 'text_pair'; did you"),
        ("superglue/wic", {"sentence1": "a"}, r"dev.jsonl:1: column 'word' is missing \(columns found: sentence1\)"),
    ],
)
def test_a_missing_column_is_named(name: str, row: dict[str, Any], message: str, tmp_path: Path):
    write(tmp_path / name / "dev.jsonl", row)
    with pytest.raises(DataError, match=message):
        read_records(f"set:{tmp_path / name}:dev")
