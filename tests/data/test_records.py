from __future__ import annotations

import builtins
import csv
import gzip
import io
import json
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertology_serve.data import formats
from bertology_serve.data.records import field_of, read_records
from bertology_serve.errors import DataError, NotFound, SpecError, Unsupported
from bertology_serve.tasks.multi_label import MultiLabel
from bertology_serve.tasks.spec import TaskSpec

ROWS = [{"text": 'caffè, "great"', "label": "good"}, {"text": "two\nlines", "label": "bad"}]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def columns(**arrays):
    out = io.BytesIO()
    pq.write_table(pa.table(arrays), out)
    return out.getvalue()


def twice(name):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=[name, name]), out)
    return out.getvalue()


def bad_text():
    """A column of texts with one that is not UTF-8."""
    return pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])


WRITERS = {
    "x.jsonl": jsonl,
    "x.ndjson": jsonl,
    "x.JSONL": jsonl,
    "x.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "lines.json": jsonl,
    "x.csv": as_csv,
    "x.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "x.csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    "x.parquet": parquet,
}


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_records(written, name):
    path = written(name, WRITERS[name](ROWS))
    records = read_records(path)
    assert [dict(fields) for fields, _ in records] == ROWS
    assert records[0].where in (f"{path}:1", f"{path}:2")
    assert read_records(str(path)) == records


def test_where_is_the_line_on_which_a_row_starts(written):
    path = written("x.csv", 'text,label\n"a\nb",x\n\nc,y\n')
    assert [where for _, where in read_records(path)] == [f"{path}:2", f"{path}:5"]
    path = written("x.jsonl", '\n{"text": "a"}\n\n  \n{"text": "b"}')
    assert [where for _, where in read_records(path)] == [f"{path}:2", f"{path}:5"]


def test_byte_order_marks_and_windows_line_ends(written):
    path = written("x.csv", "text,label\r\na,x\r\n".encode("utf-8-sig"))
    assert [dict(fields) for fields, _ in read_records(path)] == [{"text": "a", "label": "x"}]
    path = written("x.jsonl", '{"text": "a"}\r\n'.encode("utf-8-sig"))
    assert [dict(fields) for fields, _ in read_records(path)] == [{"text": "a"}]


def test_quotes_are_letters_in_tsv(written):
    path = written("x.tsv", "sentence\tlabel\n\"it's\t1\n")
    assert dict(read_records(path)[0].fields) == {"sentence": "\"it's", "label": "1"}


def test_quotes_of_a_writer_are_no_letters_in_tsv(written):
    """As pandas and Excel write them, where every cell that has quotes is quoted; else all are letters."""
    rows = [
        {"text": 'He said ""no""', "label": "a, b"},
        {"text": "plain", "label": 'x "y"'},
        {"text": '"', "label": "z"},
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    assert [dict(fields) for fields, _ in read_records(written("x.tsv", out.getvalue()))] == rows
    quoted = written("all.tsv", '"text"\t"label"\r\n"He said ""no"""\t""\r\n')
    assert dict(read_records(quoted)[0].fields) == {"text": 'He said "no"', "label": None}
    bare = written("glue.tsv", 'text\tlabel\n"He said ""no"""\t0\n"Rear Window"\t1\na 5" disk\t0\n')
    assert [fields["text"] for fields, _ in read_records(bare)] == ['"He said ""no"""', '"Rear Window"', 'a 5" disk']


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_the_header_says_what_parts_cells(written, mark):
    rows = [f"text{mark}score", f'"a{mark} ""b"""{mark}0.5', f"c; d{mark}0,5" if mark == "\t" else f"c{mark}1"]
    records = read_records(written("x.csv", "\n" + "\n".join(rows) + "\n"))
    assert dict(records[0].fields) == {"text": f'a{mark} "b"', "score": "0.5"}
    assert records[1].fields["score"] == ("0,5" if mark == "\t" else "1")
    assert records[1].where.endswith("x.csv:4")


def test_commas_and_quoted_marks_of_a_header_come_first(written):
    assert dict(read_records(written("x.csv", '"a;b",c;d\n1,2\n'))[0].fields) == {"a;b": "1", "c;d": "2"}
    assert dict(read_records(written("y.csv", '"a;b"\n1\n'))[0].fields) == {"a;b": "1"}
    assert dict(read_records(written("z.csv", '"a, b";c\n1;2\n'))[0].fields) == {"a, b": "1", "c": "2"}


def test_lists_in_cells_are_json_and_empty_cells_are_none(written):
    path = written("x.csv", 'tokens,tags,text\n"[""a"", ""b""]","[0, 1]",\n')
    assert dict(read_records(path)[0].fields) == {"tokens": ["a", "b"], "tags": [0, 1], "text": None}
    path = written("x.csv", "tokens\n\"['a']\"\n")
    with pytest.raises(DataError, match=r"x\.csv:2: column 'tokens': not JSON"):
        read_records(path)


def test_columns_are_renamed_and_replace_aliases(written):
    path = written("x.jsonl", '{"text_a": "first", "text_b": "second", "body": "B", "y": 1}')
    swapped = read_records(path, {"text": "text_b", "text_pair": "text_a", "label": "y"})
    assert dict(swapped[0].fields) == {"text": "second", "text_pair": "first", "label": 1, "body": "B"}
    mapped = read_records(path, {"text": "body"})
    assert dict(mapped[0].fields) == {"text": "B", "text_b": "second", "y": 1, "text_a (of the file)": "first"}
    assert read_records(written("t.csv", 'words\n"[""a""]"\n'), {"tokens": "words"})[0].fields == {"tokens": ["a"]}


def test_a_column_is_found_under_its_name_in_the_file(written):
    path = written("x.csv", "text,label,y=1?\na,shop 1,good\n")
    columns = {"label": "y=1?"}
    record = read_records(path, columns)[0]
    found = {name: record.fields[field_of(name, columns, [record])] for name in ("text", "label", "y=1?", " y=1?")}
    assert found == {"text": "a", "label": "shop 1", "y=1?": "good", " y=1?": "good"}
    assert record.fields["label"] == "good"
    assert field_of("label", {}, [record._replace(fields={"label": 1})]) == "label"


def test_wrong_columns_name_the_nearest(written):
    path = written("x.jsonl", '{"sentence": "a"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:1: no column 'sentense' for 'text'; did you mean 'sentence'"):
        read_records(path, {"text": "sentense"})
    with pytest.raises(SpecError, match="no task reads the field 'txt'; did you mean 'text'"):
        read_records(path, {"txt": "sentence"})


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.jsonl", b"", r"x\.jsonl: holds no records"),
        ("x.jsonl", b"\n\n", r"x\.jsonl: holds no records"),
        ("x.json", b"[]", r"x\.json: holds no records"),
        ("x.csv", b"", r"x\.csv: empty file; expected a header line"),
        ("x.csv", b"text,label\n", r"x\.csv: holds no records"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl:2: not JSON"),
        ("x.jsonl", b'{"text": "a"}\n3\n', r"x\.jsonl:2: a JSON int; expected an object"),
        ("x.json", b'[{"text": "a"}, null]', r"x\.json:2: a JSON NoneType; expected an object"),
        ("x.jsonl", b"[" * 100_000, r"x\.jsonl: JSON nested too deeply"),
        ("x.jsonl", b'{"text": "caf\xe9"}\n', r"x\.jsonl:1: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("x.csv", "text\nà\n".encode("utf-16"), r"x\.csv:1: byte 0xff is not UTF-8"),
        ("x.csv", b"text\na\0b\n", r"x\.csv:2: a NUL byte"),
        ("x.csv", b"text,label\na,b\nc\n", r"x\.csv:3: 1 cells; the header names 2 columns \(text, label\)"),
        ("x.csv", b"text,label\na,b,c\n", r"x\.csv:2: 3 cells; the header names 2 columns"),
        ("x.csv", b"text,text\na,b\n", r"x\.csv:1: the header names 'text' twice"),
        ("x.csv", b"text,text \na,b\n", r"x\.csv:1: the header names 'text' twice"),
        ("x.csv", b", \na,b\n", r"x\.csv:1: the header names no column"),
        ("x.csv", b'text\n"open\n', r"x\.csv:2: malformed row"),
        ("x.csv", b'text\n"a"b\n', r"x\.csv:2: malformed row"),
        ("x.jsonl.gz", b"plain", r"x\.jsonl\.gz:1: broken gzip file"),
        ("x.jsonl.gz", gzip.compress(jsonl(ROWS * 99))[:-30], r"x\.jsonl\.gz:\d+: broken gzip file"),
        ("x.parquet", b"PAR1 but no", r"x\.parquet:1: broken Parquet file"),
        ("x.parquet", parquet(ROWS)[:-40] + b"x" * 40, r"x\.parquet:1: broken Parquet file"),
        (
            "x.parquet",
            columns(text=bad_text()),
            r"x\.parquet:1: column 'text' cannot be read from this row on \('utf-8'",
        ),
        ("x.parquet", columns(t=pa.array([1001], pa.timestamp("ns"))), r"x\.parquet:1: column 't' .*[Nn]anosecond"),
        ("x.parquet", columns(t=pa.array([2**30], pa.date32())), r"x\.parquet:1: column 't' cannot be read"),
        ("x.parquet", twice("text"), r"x\.parquet: two columns are called 'text'"),
        ("x.xlsx", b"", r"x\.xlsx: unknown kind of file; expected \.jsonl, "),
        ("x", b"", r"x: unknown kind of file"),
        ("x.parquet.gz", b"", r"x\.parquet\.gz: unknown kind of file"),
    ],
)
def test_bad_files_are_one_line(written, name, content, problem):
    with pytest.raises(DataError, match=problem) as caught:
        read_records(written(name, content))
    assert "\n" not in str(caught.value)


def test_no_such_file_and_a_folder(tmp_path):
    with pytest.raises(NotFound, match=r"no file .*none\.jsonl; give a file that exists"):
        read_records(tmp_path / "none.jsonl")
    folder = tmp_path / "x.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match="not a file; give the file inside it"):
        read_records(folder)


def test_parquet_without_pyarrow(written, monkeypatch):
    path = written("x.parquet", parquet(ROWS))
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.startswith("pyarrow")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(Unsupported, match=r"Parquet needs pyarrow; pip install bertology-serve\[data\]"):
        read_records(path)


def test_a_header_s_blanks_and_columns_without_a_name(written):
    """As pandas writes its index, and as people type headers."""
    path = written("x.csv", ",text , label,\n0,a,x,\n1,b,y,\n")
    assert [dict(fields) for fields, _ in read_records(path)] == [
        {"text": "a", "label": "x"},
        {"text": "b", "label": "y"},
    ]
    for name in ("x.csv", "x.jsonl", "x.parquet"):
        path = written(name, WRITERS[name]([{"sentence ": "a", "y\u00a0": "1"}]))
        assert dict(read_records(path, {"text": "sentence", "label": "y"})[0].fields) == {"text": "a", "label": "1"}


def test_a_long_cell_and_a_line_without_an_end(written, monkeypatch):
    assert len(read_records(written("x.csv", b"text\n" + b"a" * 200_000))[0].fields["text"]) == 200_000
    monkeypatch.setattr(formats, "MOST_BYTES", 3 << 20)
    path = written("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' + b" " * (4 << 20)))
    with pytest.raises(DataError, match=r"x\.jsonl\.gz:2: a line of more than 3 MiB; expected one record a line"):
        read_records(path)

    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            buffer[:] = b"a" * len(buffer)
            return len(buffer)

    with pytest.raises(DataError, match=r"^stdin:1: a line of more than 3 MiB"):
        list(formats.bounded_lines(io.BufferedReader(Endless()), "stdin"))


TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)


@given(
    rows=st.lists(st.fixed_dictionaries({"text": TEXTS, "label": TEXTS}), min_size=1, max_size=4), ascii=st.booleans()
)
def test_any_text_comes_back_from_json_lines(rows, ascii):
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl")
        path.write_bytes("".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in rows).encode())
        assert [dict(record.fields) for record in read_records(path)] == rows


@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), end=st.sampled_from(["\n", "\r\n"]))
def test_any_text_but_nul_comes_back_from_csv(rows, end):
    rows = [tuple(cell.replace("\0", "") for cell in row) for row in rows]
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.csv")
        path.write_bytes(out.getvalue().encode())
        found = [record.fields for record in read_records(path)]
    assert found == [{"text": text or None, "label": label or None} for text, label in rows]


@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=5))
def test_a_damaged_parquet_file_is_read_or_named(changes):
    content = bytearray(parquet(ROWS * 50))
    for place, value in changes:
        content[place % len(content)] = value
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.parquet")
        path.write_bytes(content)
        try:
            read_records(path)
        except DataError as problem:
            assert str(problem).startswith(str(path))  # noqa: PT017


def test_what_holds_no_records_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'x.jsonl'}: holds no records")):
        read_records(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="list: holds no records"):
        read_records([])


def test_remembered_columns_count_where_a_record_has_them(written):
    remembered = {"text": "body", "label": "mood", "of a later version": "x", "score": "value"}
    path = written("x.jsonl", '{"body": "a", "text": "b", "mood": 1}\n{"text": "c", "label": 2}')
    assert [dict(fields) for fields, _ in read_records(path, None, remembered)] == [
        {"text": "a", "label": 1, "text (of the file)": "b"},
        {"text": "c", "label": 2},
    ]
    with pytest.raises(DataError, match="no column 'body' for 'text'"):
        read_records(written("y.jsonl", '{"text": "a"}'), {"text": "body"}, remembered)


def test_several_columns_are_one_field(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("comment,toxic, insult\nI like it,0,0\nyou fool,1,1\n,1,0\n")
    rows = read_records(path, {"text": "comment", "label": "toxic|insult"})
    assert [fields["label"] for fields, _ in rows] == [{"toxic": a, "insult": b} for a, b in ("00", "11", "10")]
    task = MultiLabel(TaskSpec("multi-label", MultiLabel.labels_in(rows)))
    assert task.spec.labels == ("insult", "toxic")
    assert task.target(task.example(*rows[1], labelled=True), []) == (1, 1, 0, 0)
    with pytest.raises(DataError, match=r"no column 'toxic\|rude' for 'label'"):
        read_records(path, {"label": "toxic|rude"})
