from __future__ import annotations

import hashlib
import hmac
import json
import random
from typing import Any

import pytest

from bertology_serve.errors import DataError, FormatError, LimitError, SpecError, Unsupported
from bertology_serve.tasks.redaction import PATTERNS, Redactor, restore, utf16_units
from bertology_serve.tasks.spec import TaskSpec

TAGS = TaskSpec("token-classification", ("O", "B-PER", "I-PER", "B-ORG", "I-ORG"))
TEXT = "Ada Lovelace (ada@x.org) and Ada met Acme"
ENTITIES = [("PER", "Ada Lovelace", 0), ("PER", "Ada", 29), ("ORG", "Acme", 37)]


def entities(text: str, *spans: tuple[str, str, int]) -> dict[str, Any]:
    found = [
        {"label": label, "start": start, "end": start + len(part), "text": part, "score": 0.5}
        for label, part, start in spans
    ]
    assert all(text[one["start"] : one["end"]] == one["text"] for one in found)
    return {"entities": found}


def redacted(text: str, *spans: tuple[str, str, int], redactor: Redactor | None = None, **fields: Any) -> Any:
    asked = (redactor or Redactor()).asked(fields, "record", TAGS)
    assert asked is not None
    return asked.of(text, entities(text, *spans))


def test_a_policy_for_all_or_for_each_label():
    assert redacted(TEXT, *ENTITIES, redact=True)["redacted"] == "[PER] (ada@x.org) and [PER] met [ORG]"
    assert redacted(TEXT, *ENTITIES, redact="keep", patterns=True)["redacted"] == TEXT.replace("ada@x.org", "[EMAIL]")
    some = redacted(TEXT, *ENTITIES, redact={"PER": "replace", "*": "keep"}, patterns=["EMAIL"])
    assert some["redacted"] == "[PER_1] ([EMAIL]) and [PER_2] met Acme"
    assert some["placeholders"] == {"[PER_1]": "Ada Lovelace", "[PER_2]": "Ada"}
    unnamed = redacted(TEXT, *ENTITIES, redact={"PER": "keep"})
    assert unnamed["redacted"] == TEXT.replace("Acme", "[ORG]"), "labels without a policy are masked, not let through"
    named = redacted(TEXT, *ENTITIES, redact="keep", patterns={"EMAIL": "replace"})
    assert named["placeholders"] == {"[EMAIL_1]": "ada@x.org"}
    assert redacted(TEXT, *ENTITIES, patterns=True)["redacted"] == "[PER] ([EMAIL]) and [PER] met [ORG]"


def test_what_was_redacted_is_listed_with_what_stands_there():
    answer = redacted(TEXT, *ENTITIES, redact=True, offsets="utf16")
    assert answer["redactions"][1] == {
        "label": "PER", "start": 29, "end": 32, "text": "Ada", "replacement": "[PER]",
        "start_utf16": 29, "end_utf16": 32,
    }  # fmt: skip
    assert "placeholders" not in answer
    assert answer["entities"][0]["end_utf16"] == 12


def test_hashes_are_stable_and_keyed_where_there_is_a_key():
    plain = redacted(TEXT, *ENTITIES, redact="hash")["redacted"]
    assert plain.startswith(f"[PER:{hashlib.sha256(b'Ada Lovelace').hexdigest()[:12]}] (ada@x.org) and [PER:")
    key = "0123456789abcdef"
    keyed = redacted("Ada, Ada", ("PER", "Ada", 0), ("PER", "Ada", 5), redactor=Redactor(key=key), redact="hash")
    digest = hmac.new(key.encode(), b"Ada", hashlib.sha256).hexdigest()[:12]
    assert keyed["redacted"] == f"[PER:{digest}], [PER:{digest}]"


def test_equal_surfaces_share_a_placeholder_and_no_placeholder_is_in_the_text():
    text = "Ada [PER_1] [PER_2] Bob, Ada [[PER_3] ]"
    answer = redacted(text, ("PER", "Ada", 0), ("PER", "Bob", 20), ("PER", "Ada", 25), redact="replace")
    assert answer["redacted"] == "[PER_4] [PER_1] [PER_2] [PER_5], [PER_4] [[PER_3] ]"
    assert restore(answer["redacted"], answer["placeholders"]) == text
    moved = restore("[PER_5] greets [PER_4] and [PER_9]", answer["placeholders"])
    assert moved == "Bob greets Ada and [PER_9]"


def test_a_mask_is_never_taken_for_a_placeholder():
    spec = TaskSpec("token-classification", ("O", "PER", "PER_1", "a]b [c"))
    asked = Redactor().asked({"redact": {"PER": "replace", "a]b [c": "replace"}}, "record", spec)
    assert asked is not None
    text = "Ada Bob Cy"
    answer = asked.of(text, entities(text, ("PER", "Ada", 0), ("PER_1", "Bob", 4), ("a]b [c", "Cy", 8)))
    assert answer["redacted"] == "[PER_2] [PER_1] [a_b__c_1]"
    assert restore(answer["redacted"], answer["placeholders"]) == "Ada [PER_1] Cy"


def test_the_longest_span_wins_and_what_is_left_of_the_other_is_redacted_too():
    text = "to Ada Lovelace, ada@mail.example.org"
    inside = redacted(text, ("PER", "ada", 17), redact=True, patterns=True)
    assert inside["redacted"] == "to Ada Lovelace, [EMAIL]"
    across = redacted(text, ("PER", "Ada Lovelace, ada@mail", 3), redact="replace", patterns={"EMAIL": "replace"})
    assert across["placeholders"] == {"[PER_1]": "Ada Lovelace, ada@mail", "[EMAIL_1]": ".example.org"}
    kept = redacted(text, ("PER", text[3:], 3), redact="keep", patterns=True)
    assert kept["redacted"] == "to Ada Lovelace, [EMAIL]", "what is kept covers nothing"
    equal = redacted(text, ("PER", "ada@mail.example.org", 17), redact=True, patterns=True)
    assert equal["redacted"] == "to Ada Lovelace, [PER]", "of equally long ones the model's"
    own = Redactor({"AB": "ab", "BC": "bc", "NOTHING": "x*"})
    first = redacted("abc", redactor=own, patterns=["BC", "AB", "NOTHING"])
    assert first["redacted"] == "[AB][BC]", "then the one of the pattern that is named first where they are defined"


FOUND = {
    "EMAIL": [
        ("a.l+x@mail.example.co.uk, <b@x.org>.", ["a.l+x@mail.example.co.uk", "b@x.org"]),
        ("ünï@büch.de mailto:x@a.org-foo", ["ünï@büch.de", "x@a.org-foo"]),
        ("no@x @x.org a@.org a@b.c a@b..org", []),
    ],
    "IBAN": [
        ("DE89 3704 0044 0532 0130 00 IS MINE", ["DE89 3704 0044 0532 0130 00"]),
        ("gb82west12345698765432", ["gb82west12345698765432"]),
        ("FR1420041010050500013M02606 NO9386011117947.", ["FR1420041010050500013M02606", "NO9386011117947"]),
        ("DE89\u00a03704 0044 0532 0130 00", ["DE89\u00a03704 0044 0532 0130 00"]),
        ("DE88370400440532013000 DE8937040044053201300 XDE89370400440532013000 ZZ89370400440532013000", []),
    ],
    "CARD": [
        ("4111 1111 1111 1111 12, 378282246310005", ["4111 1111 1111 1111", "378282246310005"]),
        ("5678 4111-1111-1111-1111 6011000990139424", ["4111-1111-1111-1111", "6011000990139424"]),
        ("4111111111111112 x4111111111111111 41111111111111111111111 1111111111111", []),
    ],
    "PHONE": [
        ("+49 (0)30 901820, +44 20 7946 0958.", ["+49 (0)30 901820", "+44 20 7946 0958"]),
        ("tel:+14155552671", ["+14155552671"]),
        ("0049 30 901820 or 030/9018-2000", ["0049 30 901820", "030/9018-2000"]),
        ("(415) 555-2671 415.555.2671 0123456789", ["(415) 555-2671", "415.555.2671", "0123456789"]),
        ("01-02-2024 03/04/2024 10:30 2024-01-02 3.14159265 0000000000000000000 415 5552671 12345678", []),
    ],
    "IP": [
        ("192.168.001.001, 1.2.3.4. 1.2.3.4:80", ["192.168.001.001", "1.2.3.4", "1.2.3.4"]),
        ("::1 2001:db8::1: [fe80::1%eth0] ::ffff:10.0.0.1", ["::1", "2001:db8::1", "fe80::1", "::ffff:10.0.0.1"]),
        ("256.1.1.1 1.2.3 1.2.3.4.5 10:20:30 std::vector :: 1:2", []),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "found"), [(name, *case) for name, cases in FOUND.items() for case in cases])
def test_packaged_patterns(name, text, found):
    assert [text[start:end] for start, end in PATTERNS[name].spans(text)] == found


@pytest.mark.parametrize(
    "unit", ["1", "1 ", "a", "a@", "@a", "a.", "a@a.", ":", "1:", "+1 ", "0 ", "(0", "AD24", "4 ", "1.", "f:"]
)
def test_packaged_patterns_take_time_by_the_length_of_the_text(unit):
    """Quadratic work on the longest text that is taken would be minutes, as would a catastrophe on a short one."""
    text = unit * (100_000 // len(unit))
    for pattern in PATTERNS.values():
        assert all(start < end for start, end in pattern.spans(text))


def test_own_patterns_come_from_a_file(tmp_path):
    path = tmp_path / "redaction.json"
    path.write_text(json.dumps({"key": "k" * 16, "patterns": {"ORDER": r"\bA-[0-9]{6}\b", "EMAIL": "never"}}))
    redactor = Redactor.read(path)
    answer = redacted("A-123456 a@x.org", redactor=redactor, patterns=True)
    assert answer["redacted"] == "[ORDER] a@x.org"
    assert redactor.key == b"k" * 16


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"patterns": {"ORDER": "("}}, SpecError, "pattern 'ORDER' is no regular expression: missing \\)"),
        ({"patterns": {"ORDER": 1}}, SpecError, "pattern 'ORDER' is no regular expression"),
        ({"patterns": {"order": "a"}}, SpecError, "pattern 'order'; expected a name of capitals"),
        ({"patterns": {f"P{i}": "a" for i in range(65)}}, SpecError, "there are 65 patterns; expected at most 64"),
        ({"key": "short"}, SpecError, "the key of hashes has 5 characters; expected at least 16"),
        ({"key": 1}, FormatError, "expected a text under 'key'"),
        ({"keys": ""}, FormatError, "expected an object with 'key', 'patterns', or both"),
        ([], FormatError, "expected an object with"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, values, kind, message):
    path = tmp_path / "redaction.json"
    path.write_text(json.dumps(values))
    with pytest.raises(kind, match=message):
        Redactor.read(path)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(FormatError, match="No such file"):
        Redactor.read(tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b'{"key": "\xff')
    with pytest.raises(FormatError, match="is not valid JSON"):
        Redactor.read(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"redact": {"PRE": "mask"}}, "field 'redact' names the unknown 'PRE'; did you mean 'PER'"),
        ({"redact": {"PER": "drop"}}, "field 'redact.PER' is 'drop' \\(str\\); expected 'keep' or 'mask' or"),
        ({"redact": "drop"}, "field 'redact.\\*' is 'drop'"),
        ({"redact": 3}, "field 'redact.\\*' is 3"),
        ({"redact": ["PER"]}, "field 'redact.\\*' is \\['PER'\\]"),
        ({"redact": True, "patterns": ["MAIL"]}, "field 'patterns' names the unknown 'MAIL'; did you mean 'EMAIL'"),
        ({"redact": True, "patterns": {"(a+)+": "mask"}}, "field 'patterns' names the unknown '\\(a\\+\\)\\+'"),
        ({"offsets": "bytes"}, "field 'offsets' is 'bytes' \\(str\\); expected 'characters' or 'utf16'"),
    ],
)
def test_what_cannot_be_asked_is_named(fields, message):
    with pytest.raises(DataError, match=f"record: {message}"):
        Redactor().asked(fields, "record", TAGS)


def test_tasks_without_spans_refuse():
    mood = TaskSpec("classification", ("a", "b"))
    with pytest.raises(Unsupported, match="classification finds no spans; leave 'redact' out"):
        Redactor().asked({"redact": True}, "record", mood)
    with pytest.raises(Unsupported, match="leave 'offsets' out"):
        Redactor().asked({"offsets": "utf16"}, "record", mood)
    with pytest.raises(Unsupported, match="question-answering finds no spans; leave 'redact' out"):
        Redactor().asked({"patterns": True}, "record", TaskSpec("question-answering"))
    assert Redactor().asked({"redact": False, "offsets": "characters"}, "record", mood) is None


def test_a_text_that_is_not_read_whole_is_not_redacted():
    asked = Redactor().asked({"redact": True}, "record", TAGS)
    assert asked is not None
    asked.check(0, "record")
    with pytest.raises(LimitError, match="record: the last 3 tokens are not read"):
        asked.check(3, "record")


def test_utf16_units_are_those_of_the_codec():
    text = "a\u00e9\U0001f600\u4e2d\U00020000e\u0301\0"
    assert [utf16_units(text)(at) for at in range(len(text) + 1)] == [
        len(text[:at].encode("utf-16-le")) // 2 for at in range(len(text) + 1)
    ]


PIECES = (
    *("Ada", "Paris", "the", "don't", "U.S.A.", "http://x.org/a?b", "@ada", "#tag", ".", "[", "]", "[PER_1]", "[PER]"),
    *(
        "\n",
        "\r\n",
        "\0",
        "\t",
        "\x85",
        "\x1f",
        "\x7f",
        "\u00a0",
        "\u202f",
        "\u3000",
        "\u200b",
        "\ufeff",
        "\u2028",
        " ",
        " ",
    ),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea"),  # emoji
    *("e\u0301", "\u0301", "A\u030a\u0327", "\u1f88", "\u0130", "\ufb03", "\u0939\u093f\u0928\u094d\u0926\u0940"),
    *("\u4e2d\u6587", "\u6771\u4eac", "\u3072\u3089", "\ud55c\uad6d", "\U00020000\U0002a6d6"),
    *("\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627", "\u202eabc\u202c"),  # right to left
    *("\U0001d400", "\ufdd0", "\uffff", "\U0010ffff"),
    *("a@x.org", "+49 30 901820", "1.2.3.4", "::1", "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00"),
)


def trouble(seed: int, count: int = 2000) -> list[str]:
    """Texts of everything that goes wrong with offsets; none is white space alone."""
    draw, texts = random.Random(seed), list[str]()
    while len(texts) < count:
        text = "".join(draw.choices(PIECES, k=draw.randint(1, 24)))
        if not text.isspace():
            texts.append(text)
    return texts


def test_random_spans_of_texts_of_trouble_restore():
    draw = random.Random(5)
    for text in trouble(6, 500):
        ends = sorted(draw.sample(range(len(text) + 1), k=2 * draw.randint(0, (len(text) + 1) // 2)))
        labels = [draw.choice(("PER", "ORG")) for _ in ends[::2]]
        spans = [(label, text[a:b], a) for label, a, b in zip(labels, ends[::2], ends[1::2], strict=True)]
        answer = redacted(text, *spans, redact="replace", patterns="replace", offsets="utf16")
        assert restore(answer["redacted"], answer.get("placeholders", {})) == text
        covered = {at for _, part, start in spans for at in range(start, start + len(part))}
        touched = {at for one in answer["redactions"] for at in range(one["start"], one["end"])}
        assert covered <= touched, "no character that a span covers stays"
