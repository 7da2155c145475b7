from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import DataError
from bertology_serve.serving.offline import Line, PredictOptions, answer_lines, batches, read_lines
from tests.serving.conftest import RECORDS


def run(pipeline: Pipeline, lines: list[bytes], **options: Any) -> list[Any]:
    named = [Line(f"in.jsonl:{number}", one) for number, one in enumerate(lines, 1)]
    return [
        json.loads(one) for _, answers in answer_lines(pipeline, named, PredictOptions(**options)) for one in answers
    ]


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def test_answers_come_in_order_whatever_the_batches(pipeline):
    records = [{"delta": name, "id": f"{name}-{i}", **record} for i in range(3) for name, record in RECORDS.items()]
    answers = run(pipeline, [line(**record) for record in records], max_tokens=30)
    assert [answer["id"] for answer in answers] == [record["id"] for record in records]
    for record, answer in zip(records, answers, strict=True):
        alone = pipeline.run([pipeline.prepare(Request(record["delta"], record))])[0].as_dict()
        assert answer["delta"] == record["delta"]
        assert answer["version"] == alone["version"]
        for name in ("value", "score", "similarity"):
            if name in alone:
                assert answer[name] == pytest.approx(alone[name], abs=1e-5)


def test_a_question_that_is_cut_counts_and_a_context_in_windows_does_not(pipeline):
    context = "the cat was in the house " * 9
    lines = [line(delta="finder", question="where was " * n, context=context) for n in (2, 20)]
    short, long = run(pipeline, lines)
    assert "truncated" not in short
    assert long["tokens_given"] - long["tokens_read"] == 40 - (24 - 3) // 2


def test_files_are_read_one_after_the_other_without_marks_and_blank_lines(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    first.write_bytes(b"\xef\xbb\xbf{}\n\n  \n[]")
    second.write_bytes(gzip.compress(b"\n7\n"))
    found = list(read_lines([str(first), str(second)]))
    assert found == [(f"{first}:1", b"{}\n"), (f"{first}:4", b"[]"), (f"{second}:2", b"7\n")]


def test_ids_keep_their_type(pipeline):
    first, second = run(pipeline, [line(delta="mood", text="cat", id=7), line(delta="mood", text="dog")])
    assert first["id"] == 7
    assert "id" not in second


def test_a_line_may_ask_several_deltas(pipeline):
    """Their answers stand together, each as if it had been asked alone."""
    text = {"text": "the cat was in the house"}
    lines = [line(deltas=["mood", "names"], id=7, **text), line(delta="mood", **text), line(deltas=["names"], **text)]
    for max_tokens in (1, 2048):
        both, mood, tags = run(pipeline, lines, max_tokens=max_tokens, logits=True)
        assert list(both) == ["id", "deltas"]
        assert both["id"] == 7
        assert list(both["deltas"]) == ["mood", "names"]
        assert list(tags) == ["deltas"]
        assert both["deltas"]["mood"]["logits"] == pytest.approx(mood["logits"], abs=1e-5)
        assert both["deltas"]["names"]["entities"] == tags["deltas"]["names"]["entities"]


def test_redaction_is_for_those_that_find_spans(pipeline):
    lines = [line(deltas=["mood", "names"], text="Ada went to Paris"), line(delta="mood", text="Ada went to Paris")]
    several, one = run(pipeline, lines, redaction={"redact": {"*": "mask"}})
    assert "redacted" in several["deltas"]["names"]
    assert "redacted" not in several["deltas"]["mood"]
    assert "redacted" not in one


def test_logits_for_all_lines_or_for_those_that_ask(pipeline):
    lines = [line(delta="mood", text="cat", logits=True), line(delta="mood", text="cat")]
    assert ["logits" in answer for answer in run(pipeline, lines)] == [True, False]
    assert ["logits" in answer for answer in run(pipeline, lines, logits=True)] == [True, True]


BAD = [
    (b"{", "in.jsonl:2: the line is not JSON"),
    (b'{"delta": "\xff"}', "in.jsonl:2: the line is not UTF-8"),
    (b"[1]", "in.jsonl:2: is a list; expected an object"),
    (line(text="cat"), "in.jsonl:2: field 'delta' is null"),
    (line(delta="moot", text="cat"), "in.jsonl:2: no delta 'moot'"),
    (line(deltas=["mood", "moot"], text="cat"), "in.jsonl:2: no delta 'moot'"),
    (line(deltas="mood", text="cat"), "in.jsonl:2: field 'deltas' is a text; expected a list of names of deltas"),
    (line(delta="mood", text=""), "in.jsonl:2: field 'text' is empty"),
    (b"[" * 20_000, "in.jsonl:2: the line is nested too deeply"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message.split(":2: ")[1] for _, message in BAD])
def test_a_bad_line_is_named(pipeline, bad, message):
    good = line(delta="mood", text="cat")
    with pytest.raises(DataError) as problem:
        run(pipeline, [good, bad, good])
    assert str(problem.value).startswith(message)
    assert str(problem.value).endswith("(--skip-bad goes on)")
    first, error, last = run(pipeline, [good, bad, good], skip_bad=True)
    assert error["error"].startswith(message)
    assert first.keys() == last.keys()
    assert first["label"] == last["label"]  # two rows of one batch may differ in their last bits
    assert first["scores"] == pytest.approx(last["scores"], abs=1e-5)


def test_a_skipped_line_keeps_what_names_it(pipeline):
    (answer,) = run(pipeline, [line(delta="moot", text="cat", id="a")], skip_bad=True)
    assert (answer["id"], answer["delta"]) == ("a", "moot")


def test_lines_are_read_a_window_at_a_time(pipeline):
    read = 0

    def lines() -> Any:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield Line("x", line(delta="mood", text="the cat was good"))

    answers = answer_lines(pipeline, lines(), PredictOptions(max_tokens=12))
    next(answers)
    assert read < 50
    answers.close()


@given(st.lists(st.integers(1, 20)), st.integers(1, 30))
def test_batches_hold_everything_once_within_the_budget(costs, budget):
    found = batches(costs, budget)
    assert sorted(index for batch in found for index in batch) == list(range(len(costs)))
    assert all(len(batch) == 1 or sum(costs[i] for i in batch) <= budget for batch in found)
    assert all(found)


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.CSV.gz"])
def test_a_table_is_refused_with_a_program_that_writes_json_lines(name, tmp_path, capsys):
    path, mark = tmp_path / name, "\t" if ".tsv" in name else ","
    content = f"text{mark}label\na film{mark}good\n".encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=r"a \.[ct]sv file; expected JSON lines, each with its delta") as caught:
        list(read_lines([str(path)]))
    exec(str(caught.value).split('python -c "')[1].removesuffix('"'), {})
    assert json.loads(capsys.readouterr().out) == {"text": "a film", "label": "good", "delta": "NAME"}


@pytest.mark.parametrize("name", ["x.parquet", "x.conll", "x.conllu"])
def test_other_files_of_records_are_refused_too(name):
    with pytest.raises(DataError, match="expected JSON lines, each with its delta"):
        list(read_lines([name]))
